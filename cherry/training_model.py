"""One model in training: its losses, how it is built and sharded on its ranks, and its optimizer step.

Shapes: B sequences of a micro-batch, T position, N = B T, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from base.errors import ConfigError
from cherry import loading
from cherry.data.collate import mtp_targets
from cherry.distributed import fsdp
from cherry.distributed.context_parallel import ContextParallel, apply_context_parallel
from cherry.distributed.fsdp_hooks import Communication
from cherry.distributed.local_part import local_part
from cherry.distributed.resident_params import ResidentParams
from cherry.job_config import JobConfig
from cherry.lora import add_adapters, initialize_adapters
from cherry.loss import cross_entropy_sum
from cherry.optim.adamw import OwnGradients
from cherry.optim.build import build_optimizer
from cherry.optim.grad_norm import clip_coefficient, gradient_norm
from cherry.optim.protocol import Optimizer
from model.document_mask import Documents
from model.experts import Experts
from model.transformer import Block, DeepseekV3, next_tokens

_HOPPER = 9
"""Major number of Hopper's compute capability."""


class TrainingModel(nn.Module):
    """The model with its losses inside `forward`, so that sharding gathers the head for exactly as long as needed."""

    def __init__(self, model: DeepseekV3, loss_chunk_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.loss_chunk_tokens = loss_chunk_tokens
        self.split: ContextParallel | None = None
        """Set where other ranks compute the other positions of the same sequences."""

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor, documents: Documents | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The micro-batch's summed cross-entropy, the MTP module's summed cross-entropy, and the mean balance loss.

        With context parallelism whole sequences come in, and each of the three is this rank's share: the shares add up
        over the context ranks.
        """
        positions_T = None
        next_BT, mtp_targets_BT = next_tokens(tokens_BT), mtp_targets(targets_BT, documents)
        if self.split is not None:
            positions_T = self.split.positions(tokens_BT.shape[1], tokens_BT.device)
            tokens_BT, next_BT = tokens_BT[:, positions_T], next_BT[:, positions_T]
            targets_BT, mtp_targets_BT = targets_BT[:, positions_T], mtp_targets_BT[:, positions_T]
        out = self.model(tokens_BT, documents, positions_T=positions_T, next_BT=next_BT)
        weight_VD = self.model.lm_head.weight.to(out.hidden_BTD.dtype)
        loss = self._sum(out.hidden_BTD, weight_VD, targets_BT)
        if out.mtp_hidden_BTD is None:
            return loss, torch.zeros_like(loss), out.balance_loss
        mtp_loss = self._sum(out.mtp_hidden_BTD, weight_VD, mtp_targets_BT)
        return loss, mtp_loss, out.balance_loss

    def _sum(self, hidden_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor) -> Tensor:
        hidden_ND = hidden_BTD.flatten(0, 1)
        return cross_entropy_sum(hidden_ND, weight_VD, targets_BT.flatten(), chunk_tokens=self.loss_chunk_tokens)


@dataclass
class Network:
    """A model on its ranks, ready for steps."""

    model: DeepseekV3
    module: nn.Module
    """The sharded `TrainingModel`."""
    optimizer: Optimizer
    resident_micro_batches: int | None = None
    """Micro-batches of a step where parameters stay resident; `None` where FSDP gathers them for each pass."""
    fp8: bool = False
    resident: ResidentParams | None = None

    def start(self, communication: Communication) -> None:
        """Make the parameters ready for the next pass, once the first or a restored state is in place.

        Args:
            communication: the state of the module's hooks: which micro-batch is the last, and what is counted.
        """
        if self.resident is not None:
            self.resident.unshard()
        elif self.resident_micro_batches is not None:
            self.resident = ResidentParams(self.module, self.resident_micro_batches, communication)
            if self.fp8:
                from model.fp8.linear import cache_fp8_weights

                self.resident.cache_quantized(cache_fp8_weights(self.model))

    def gradient_norm(self) -> Tensor:
        """The total gradient norm over all ranks' shards, 0-dim fp32."""
        if self.resident is not None:
            return self.resident.gradient_norm()
        return gradient_norm(self.module)

    def gradients(self) -> list[Tensor]:
        """This rank's shards of the gradients, in the order of the parameters; those without one are left out."""
        if self.resident is not None:
            found = [self.resident.gradient(parameter) for parameter in self.resident.resident]
        else:
            found = [parameter.grad for parameter in self.module.parameters()]
        return [local_part(gradient)[0] for gradient in found if gradient is not None]

    def ready_step(self, norm: Tensor, max_norm: float) -> Callable[[], None]:
        """Callable that takes one optimizer step, with gradients clipped to a total norm of at most `max_norm`.

        All host-side lookups are done here, before anything waits for the device: it would idle.
        """
        gradients = OwnGradients() if self.resident is None else self.resident
        update = self.optimizer.ready_step(gradients, clip_coefficient(norm, max_norm))
        if self.resident is None:
            return update
        return partial(_update_resident, update, self.resident)

    def step(self, norm: Tensor, max_norm: float) -> None:
        """Take an optimizer step; see `ready_step`."""
        self.ready_step(norm, max_norm)()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        if self.resident is not None:
            self.resident.zero_grad()
        self.optimizer.zero_grad(set_to_none=True)

    def reshard(self) -> None:
        """Make the fp32 parameters the module's own, before its state is read or written from outside."""
        self.optimizer.forget_shards()
        if self.resident is not None:
            self.resident.reshard()


def _update_resident(update: Callable[[], None], resident: ResidentParams) -> None:
    update()
    resident.update()


def build(config: JobConfig, device: torch.device, print_line: Callable[[str], None] | None = None) -> Network:
    """The model of a job on this rank's device, with its initial weights; no rank ever holds all of it.

    Args:
        print_line: called with progress lines while weights are loaded.

    Raises:
        ConfigError: the precision does not fit the device.
        MissingFileError, WeightsError: see `loading.load_weights`.
    """
    train = config.train
    with torch.device("meta"):
        model = DeepseekV3(config.model)
    if config.lora is not None:
        add_adapters(model, config.lora)
    network = TrainingModel(model, train.loss_chunk_tokens)
    meshes = fsdp.build_mesh(config.parallel, device)
    if meshes is not None and meshes.context is not None:
        network.split = apply_context_parallel(model, meshes.context)
    if train.activation_checkpointing == "full":
        _wrap_blocks(model)
    if meshes is None and train.precision != "fp32":
        rule = "needs a GPU or several ranks (it is slower on one CPU)"
        raise ConfigError(f"train.precision {train.precision} {rule}. Use fp32.")
    if device.type == "cuda":
        # The router alone multiplies in fp32, from bf16 copies when training in bf16 or fp8: TensorFloat32 holds them
        # exactly, and rounds gradients less than bf16 does right after. Without it the router took 2 ms of
        # a step of 150 (H200, 2026-11-27).
        torch.set_float32_matmul_precision("highest" if train.precision == "fp32" else "high")
    if train.precision == "fp8":
        _use_fp8(model, device)
    if train.compile:
        _compile_blocks(model)
    resident = fsdp.keeps_resident_params(meshes, train.precision, config.parallel, config.communication)
    fsdp.shard_model(network, meshes, train.precision, config.parallel, resident=resident)
    fsdp.materialize(network, device, cpu_offload=config.parallel.cpu_offload)
    fsdp.initialize(model, config.seed)
    if config.init_from is not None:
        on_progress = None if print_line is None else lambda line, _: print_line(line)
        loading.load_weights(model, config.init_from, on_progress=on_progress)
    initialize_adapters(model, config.seed)
    micro_batches = train.gradient_accumulation_steps if resident else None
    return Network(model, network.train(), build_optimizer(model, train), micro_batches, train.precision == "fp8")


def _use_fp8(model: DeepseekV3, device: torch.device) -> None:
    """Switch the matmuls of blocks to fp8; CPUs emulate it.

    Raises:
        ConfigError: the GPU has no such matmuls, or the model none that is wide enough for them.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] != _HOPPER:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"train.precision fp8 needs Hopper GPUs (H100, H200, H800); this is {name}. Use bf16.")
    from model.fp8.linear import use_fp8  # brings torch's operator library along, which few need

    if not use_fp8(model):
        raise ConfigError("train.precision fp8: no matmul of this model is 128 wide, a scale's block. Use bf16.")


def _compile_blocks(model: DeepseekV3) -> None:
    for module in model.modules():
        if isinstance(module, Block):
            module.compile()
        elif isinstance(module, Experts):
            # One graph break instead of one for each expert: the counts are data.
            module.loop = torch.compiler.disable(module.loop)  # type: ignore[no-untyped-call]


def _wrap_blocks(model: DeepseekV3) -> None:
    """Recompute each block's activations in the backward pass; its name and type stay, so sharding and checkpoints see
    no change."""
    from torch.utils.checkpoint import checkpoint

    for module in model.modules():
        if isinstance(module, Block):
            forward = module.forward
            module.forward = lambda *a, _forward=forward: checkpoint(_forward, *a, use_reentrant=False)  # type: ignore[method-assign]
