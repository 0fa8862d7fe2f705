"""Training steps of transformers and torchtitan for comparison: a model of the same sizes, FSDP2 on a mesh of one rank,
fp32 parameters with bf16 compute on a GPU, fused AdamW, clip 1.0, blocks compiled on request.

Each `build_*` returns a function that takes one training step on tokens [B, T] and targets [B, T] and returns the loss.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.model_config import ModelConfig

Step = Callable[[Tensor, Tensor], Tensor]
_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
RATE, BETAS, DECAY, CLIP = 2.2e-4, (0.9, 0.95), 0.1, 1.0


def build_transformers(config: ModelConfig, device: torch.device, *, compiled: bool) -> tuple[nn.Module, Step]:
    """Model and training step of transformers' DeepseekV3ForCausalLM, with grouped_mm experts on a GPU."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    names = DeepseekV3Config.__dataclass_fields__.keys()
    fields = {key: value for key, value in config.model_dump().items() if key in names and value is not None}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    theirs = DeepseekV3Config(**{**fields, "q_lora_rank": config.q_lora_rank, "rope_parameters": rope})
    theirs.use_cache = False
    theirs._attn_implementation = "sdpa"
    if device.type == "cuda":
        theirs._experts_implementation = "grouped_mm"
    with torch.device(device):
        model = DeepseekV3ForCausalLM(theirs).train()
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    _shard(model, list(model.model.layers), device)

    def logits(tokens: Tensor) -> Tensor:
        # torch's own order takes the memory-efficient kernel here, whose backward costs ten times cuDNN's.
        with sdpa_kernel(_BACKENDS, set_priority=True):
            return model(input_ids=tokens).logits

    return model, _step(model, logits)


def build_torchtitan(config: ModelConfig, device: torch.device, *, compiled: bool) -> tuple[nn.Module, Step]:
    """Model and training step of torchtitan's DeepSeekV3Model, compiled by its own apply_compile."""
    from torchtitan.config.job_config import Compile
    from torchtitan.models.deepseek_v3.model.args import DeepSeekV3ModelArgs
    from torchtitan.models.deepseek_v3.model.model import DeepSeekV3Model
    from torchtitan.models.llama4.infra.parallelize import apply_compile
    from torchtitan.models.moe import MoEArgs

    moe = MoEArgs(
        num_experts=config.n_routed_experts,
        num_shared_experts=config.n_shared_experts,
        score_func=config.scoring_func,
        route_norm=config.norm_topk_prob,
        route_scale=config.routed_scaling_factor,
        score_before_experts=False,
        top_k=config.num_experts_per_tok,
        use_grouped_mm=device.type == "cuda",
        num_expert_groups=config.n_group if config.n_group > 1 else None,
        num_limited_groups=config.topk_group if config.n_group > 1 else None,
    )
    arguments = DeepSeekV3ModelArgs(
        max_seq_len=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        dim=config.hidden_size,
        inter_dim=config.intermediate_size,
        moe_inter_dim=config.moe_intermediate_size,
        n_layers=config.num_hidden_layers,
        n_dense_layers=config.first_k_dense_replace,
        n_heads=config.num_attention_heads,
        moe_args=moe,
        q_lora_rank=config.q_lora_rank or 0,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        original_seq_len=config.max_position_embeddings,
        rope_factor=1.0,
    )
    arguments.moe_impl = "standard"  # what its own update_from_config sets
    with torch.device(device):
        model = DeepSeekV3Model(arguments).train()
        with torch.no_grad():
            model.init_weights(buffer_device=device)
    if compiled:
        apply_compile(model, Compile(enable=True), ep_enabled=False)
    _shard(model, list(model.layers.values()), device)
    return model, _step(model, model)


def _shard(model: nn.Module, blocks: list[nn.Module], device: torch.device) -> None:
    if device.type == "cpu":
        return  # one CPU rank: neither side shards
    mesh = init_device_mesh("cuda", (dist.get_world_size(),), mesh_dim_names=("shard",))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)


def _step(model: nn.Module, logits: Callable[[Tensor], Tensor]) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, weight_decay=DECAY, fused=True)

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits(tokens).flatten(0, 1).float(), targets.flatten())

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = loss_of(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
