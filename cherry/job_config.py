"""Owns what a training job can be told: data, parallelism, optimization and checkpoints.

It needs no torch and knows nothing of flows, tracking or serving.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from base.config import Problem, Section
from model.model_config import ModelConfig

# Plain rounding of the moments costs nothing at 0.95 (loss -0.01 % against fp32) and 0.2 % at 0.99; stochastic rounding
# nothing at either. A second moment of noise is off by 0.01 % at 0.95, 0.5 % at 0.98, 4.5 % at 0.99, and at 0.998 no
# longer decays (7 M parameters, 600 steps, H100, 2026-11-25).
_BF16_MAX_BETA = 0.98


class DataConfig(Section):
    """Where documents come from and how they become fixed token sequences."""

    source: str = "python-stdlib"
    """`python-stdlib` (the embedded default), or a file, directory or glob of text or JSONL, as a path or URI."""
    format: Literal["auto", "text", "jsonl", "chat"] = "auto"
    """`auto` goes by the file name. `chat` is JSONL with `messages`; only the assistant's tokens bear loss."""
    text_key: str = "text"
    tokenizer: str | None = None
    """Path or URI of a tokenizer.json; `None` trains a byte-level BPE of model.vocab_size on the training split."""
    sequence_length: PositiveInt = 512
    heldout_fraction: float = Field(default=0.02, gt=0.0, lt=1.0)
    max_documents: PositiveInt | None = None
    """Take at most this many documents, chosen by the seed."""
    tokenizer_sample_bytes: PositiveInt = 8_000_000
    fim_rate: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of the training documents that are told prefix, suffix, middle, so that the model learns to fill in
    (DeepSeek-V3, arXiv 2412.19437, section 4.1, trains at 0.1). 0 leaves documents as they are."""
    cross_document_attention: bool = True
    """Whether a token sees the documents before its own in a packed sequence, as DeepSeek-V3 trains (section 4.1).
    `false` masks them, restarts positions with every document and predicts nothing over a boundary."""
    seed: NonNegativeInt = 0

    def problems(self) -> Iterator[Problem]:
        """A conversation is not cut up."""
        if self.fim_rate and self.format == "chat":
            yield Problem("fim_rate", "must be 0 with data.format chat: turns are not filled in", self.fim_rate)


class ParallelConfig(Section):
    """How the ranks are laid out: replicate x shard x context x expert, the last one's neighbours nearest.

    The product of the four must be the number of ranks. `replicate`, `shard` and `expert` ranks read sequences of their
    own; `context` ranks share one. Dense parameters are sharded over shard x context x expert. The experts of a layer
    are first dealt out over `expert`, then sharded over shard x context. `replicate` holds copies of all that: HSDP.
    """

    replicate: PositiveInt = 1
    shard: PositiveInt | None = None
    """`null` takes all ranks that the other axes leave."""
    expert: PositiveInt = 1
    """Ranks that share out a layer's experts; tokens go to them and back by all-to-all."""
    expert_ranks_per_node: PositiveInt | None = None
    """Of the `expert` ranks, those that share a node; `null` takes as many as are launched on each. Where they lie on
    several nodes, a token goes to each node once, and from there to its experts."""
    context: PositiveInt = 1
    """Ranks that share out the positions of a sequence."""
    reshard_after_forward: bool | PositiveInt = True
    """Free a block's gathered parameters after its forward pass. A number keeps them sharded over that many ranks until
    the backward pass (a node's, so that the second gathering stays inside it); experts are then freed all the same."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer states in the memory of the CPU; blocks travel to the GPU for use."""

    def shard_ranks(self, ranks: int) -> int:
        """The size of the `shard` axis."""
        return self.shard or ranks // (self.replicate * self.expert * self.context)

    def experts_on_node(self, ranks_per_node: int) -> int:
        """Ranks of the `expert` axis that share a node; all of it where it does not divide into nodes."""
        on_node = self.expert_ranks_per_node or ranks_per_node
        return on_node if self.expert % on_node == 0 else self.expert

    def data_ranks(self, ranks: int) -> int:
        """Ranks that read sequences of their own."""
        return ranks // self.context

    def problems_with(self, ranks: int) -> Iterator[Problem]:
        """Rules about the number of ranks; keys are relative to the whole configuration."""
        axes = {"replicate": self.replicate, "expert": self.expert, "context": self.context}
        if self.expert_ranks_per_node is not None and self.expert % self.expert_ranks_per_node:
            rule = f"must divide parallel.expert ({self.expert})"
            yield Problem("parallel.expert_ranks_per_node", rule, self.expert_ranks_per_node)
        alone = [name for name, size in axes.items() if ranks % size]
        for name in alone:
            yield Problem(f"parallel.{name}", f"must divide the number of ranks ({ranks})", axes[name])
        others = self.replicate * self.expert * self.context
        told = f"replicate * shard * expert * context must be the number of ranks ({ranks})"
        if not alone and self.shard is None and ranks % others:
            yield Problem("parallel", f"{told}; replicate * expert * context must divide it", others)
        elif not alone and self.shard is not None and others * self.shard != ranks:
            yield Problem("parallel.shard", f"{told}, and the others give {others}", self.shard)
        elif not alone:
            sharded = self.shard_ranks(ranks) * self.context * self.expert
            if not isinstance(self.reshard_after_forward, bool) and sharded % self.reshard_after_forward:
                rule = f"a number must divide the ranks that share a parameter ({sharded})"
                yield Problem("parallel.reshard_after_forward", rule, self.reshard_after_forward)


class MuonConfig(Section):
    """Options of Muon (Keller Jordan, 2024) as Moonlight trains with it (arXiv 2502.16982)."""

    momentum: float = Field(default=0.95, ge=0.0, lt=1.0)
    nesterov: bool = True
    newton_schulz_steps: PositiveInt = 5
    """Iterations that orthogonalize an update."""
    update_rms: PositiveFloat = 0.2
    """An update of an M x N matrix is scaled by this times sqrt(max(M, N)): its root mean square is then about that of
    AdamW's updates, so that learning_rate and weight_decay mean the same for both (section 2.2)."""


class TrainConfig(Section):
    """One optimizer's recipe. Defaults follow DeepSeek-V3's paper, section 4.2, where a size is not involved."""

    steps: PositiveInt = 200
    batch_size: PositiveInt = 16
    """Sequences per optimizer step, over all ranks and micro-batches."""
    gradient_accumulation_steps: PositiveInt = 1
    learning_rate: PositiveFloat = 2.2e-4
    min_learning_rate_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    warmup_steps: NonNegativeInt = 10
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` updates the matrices of decoder blocks (attention, feed-forwards, experts) by Muon; the router, embedding,
    head, norms and the MTP module's projection stay with AdamW."""
    muon: MuonConfig = MuonConfig()
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    optimizer_state_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of AdamW's two moments and of Muon's momentum. bf16 saves 4 bytes a parameter with AdamW (DeepSeek-V3,
    section 3.3.3), 2 with Muon."""
    weight_decay: NonNegativeFloat = 0.1
    max_grad_norm: PositiveFloat = 1.0
    spike_sigma: PositiveFloat | None = 6.0
    """A step whose loss or gradient norm lies so many standard deviations above the mean of the last 128 is skipped,
    as OLMo 2 does; `None` skips only what is NaN or infinite. Its data is passed over, its step counts."""
    max_skipped_steps: PositiveInt = 10
    """So many skipped in a row are a divergence."""
    on_divergence: Literal["rollback", "stop"] = "rollback"
    """Go back to the last good checkpoint, past the data that was read since (PaLM, arXiv 2204.02311, section 5.1), or
    end with an error. Without a checkpoint to go back to it is an error, too."""
    max_rollbacks: PositiveInt = 3
    """A run that diverges once more than that ends with an error."""
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """Compute precision. Parameters, gradients' reduction and optimizer states stay fp32. fp8 is bf16 with the matmuls
    of blocks in e4m3 (model/fp8/linear.py), on Hopper GPUs; CPUs emulate it."""
    activation_checkpointing: Literal["none", "full"] = "none"
    compile: bool = False
    loss_chunk_tokens: PositiveInt = 1024
    """Tokens whose logits exist at one time; fp32 logits of 4,096 x 129,280 would be 2.1 GB."""
    mtp_loss_weight: NonNegativeFloat = 0.3
    balance_loss_weight: NonNegativeFloat = 1e-4
    expert_bias_update_rate: NonNegativeFloat = 1e-3
    log_every_steps: PositiveInt = 1
    evaluate_every_steps: PositiveInt | None = None
    """Held-out loss every so many steps, always at the end; `None` only at the end."""
    heldout_sequences: PositiveInt = 64
    threads_per_rank: PositiveInt | None = None
    """CPU threads of a rank; `None` shares the machine's cores among its ranks."""

    def problems(self) -> Iterator[Problem]:
        """Decays that bf16 states can follow."""
        decays = {"beta1": self.beta1, "beta2": self.beta2}
        if self.optimizer == "muon":
            decays["muon.momentum"] = self.muon.momentum
        key = max(decays, key=decays.__getitem__)
        if self.optimizer_state_dtype == "bf16" and decays[key] > _BF16_MAX_BETA:
            rule = (
                f"must be at most {_BF16_MAX_BETA} with train.optimizer_state_dtype bf16, whose moments stick above it"
            )
            yield Problem(key, rule, decays[key])


LoraTarget = Literal[
    "q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "shared_gate_up", "shared_down"
]


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685) on frozen weights; an export has them merged in."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    """The adapters' product is multiplied with alpha / rank."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Of the adapters' input, in training."""
    targets: tuple[LoraTarget, ...] | None = None
    """Projections of every attention, and `shared_gate_up` and `shared_down` of the shared experts; `None` is all that
    the model has."""

    def problems(self) -> Iterator[Problem]:
        """Something must be adapted."""
        if self.targets is not None and not self.targets:
            yield Problem("targets", "must name at least one projection; null is all that the model has", [])


class CommunicationConfig(Section):
    """What gradients travel as, and what the communication libraries are told. All of it may change on a resume."""

    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """On the shard axis. Sums, and micro-batches' accumulation, are fp32 either way."""
    replicate: Literal["fp32", "bf16", "int8", "fp8"] = "fp32"
    """On the replicate axis; int8 and fp8 have a scale per 256 values, and send each step's rounding error later."""
    overlap: bool = True
    """`false` lets nothing run beside a collective: slower, to see what communication costs."""
    buffer_size: PositiveInt | Annotated[str, Field(pattern=r"^[1-9][0-9]*(KiB|MiB|GiB)$")] | None = None
    """NCCL's buffer per channel, in bytes or like `8MiB`; `None` leaves NCCL's own default, 4 MiB."""
    max_channels: PositiveInt | None = None
    """At most so many NCCL channels, each of which takes an SM from computation."""
    interface: str | None = None
    """Network interface of the ranks' connections, like `eth0`."""
    environment: dict[Annotated[str, Field(pattern=r"^(NCCL|TORCH_NCCL|GLOO|UCX|FI)_[A-Z0-9_]+$")], str] = Field(
        default_factory=dict
    )
    """Any other variable of NCCL, gloo or their network plug-ins, as is."""
    timeout_s: PositiveFloat | None = None
    """How long a collective may take before the job is ended; `None` is torch's default (NCCL 600, gloo 1800)."""

    def variables(self) -> dict[str, str]:
        """What the libraries read from a rank's environment. A variable that a person has set goes before these."""
        size = self.buffer_size
        if isinstance(size, str):
            size = int(size[:-3]) * 1024 ** (1 + ["KiB", "MiB", "GiB"].index(size[-3:]))
        named = {
            "NCCL_BUFFSIZE": size,
            "NCCL_MAX_NCHANNELS": self.max_channels,
            "NCCL_SOCKET_IFNAME": self.interface,
            "GLOO_SOCKET_IFNAME": self.interface,
        }
        return {**{name: str(value) for name, value in named.items() if value is not None}, **self.environment}


class CheckpointConfig(Section):
    """When training state is saved and how much of it is kept."""

    every_steps: PositiveInt = 50
    keep_last: PositiveInt = 2
    keep_every_steps: PositiveInt | None = None
    """Checkpoints of steps that this divides are kept for good, besides the last ones."""
    asynchronous: bool = True
    directory: str | None = None
    """Where checkpoints go, as a path or URI; `None` is `checkpoints/` inside the run directory."""


class LaunchConfig(Section):
    """How `cherry-launch` starts the ranks of one job on this host."""

    nproc_per_node: PositiveInt = 1
    nnodes: PositiveInt = 1
    master_addr: str = "127.0.0.1"
    master_port: PositiveInt | None = None
    """`None` picks a free port (one node only)."""


class JobConfig(Section):
    """Everything `train.py` reads. The flow's configuration has these sections and more."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    seed: NonNegativeInt = 0
    init_from: str | None = None
    """Weights to start from: a Hugging Face safetensors folder or URI; `None` starts from random weights."""
    model: ModelConfig
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    communication: CommunicationConfig = CommunicationConfig()
    train: TrainConfig = TrainConfig()
    lora: LoraConfig | None = None
    """Train low-rank adapters alone, on frozen weights from `init_from`; `None` trains everything."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    launch: LaunchConfig = LaunchConfig()

    def problems(self) -> Iterator[Problem]:
        """Rules over several sections."""
        ranks = self.launch.nproc_per_node * self.launch.nnodes
        data_ranks = self.parallel.data_ranks(ranks)
        micro = max(1, data_ranks) * self.train.gradient_accumulation_steps
        if self.train.batch_size % micro:
            told = "ranks" if self.parallel.context == 1 else "ranks / parallel.context"
            rule = (
                f"must be divisible by {told} * train.gradient_accumulation_steps "
                f"({data_ranks} * {self.train.gradient_accumulation_steps} = {micro})"
            )
            yield Problem("train.batch_size", rule, self.train.batch_size)
        yield from self._parallel_problems(ranks)
        if self.communication.replicate != "fp32" and self.parallel.replicate == 1:
            rule = "compresses between replicas, and parallel.replicate is 1"
            yield Problem("communication.replicate", rule, self.communication.replicate)
        if self.launch.nnodes > 1 and self.launch.master_port is None:
            yield Problem("launch.master_port", "is required when launch.nnodes > 1", None)
        if self.data.sequence_length > self.model.max_position_embeddings:
            rule = f"must be at most model.max_position_embeddings ({self.model.max_position_embeddings})"
            yield Problem("data.sequence_length", rule, self.data.sequence_length)
        if self.train.warmup_steps >= self.train.steps:
            yield Problem(
                "train.warmup_steps", f"must be below train.steps ({self.train.steps})", self.train.warmup_steps
            )
        if self.data.tokenizer is None and self.model.vocab_size < 512:
            rule = "a byte-level BPE needs 256 byte tokens, special tokens and merges: at least 512"
            yield Problem("model.vocab_size", rule, self.model.vocab_size)
        if self.train.optimizer == "muon":
            yield from self._muon_problems()
        if self.lora is not None:
            yield from self._lora_problems(self.lora)

    def _muon_problems(self) -> Iterator[Problem]:
        if self.lora is not None:
            rule = "must be adamw with lora: an adapter's two factors are not the matrix that Muon would orthogonalize"
            yield Problem("train.optimizer", rule, self.train.optimizer)
        if self.parallel.cpu_offload:
            rule = "must be adamw with parallel.cpu_offload: Muon's matrix products would run on the CPU"
            yield Problem("train.optimizer", rule, self.train.optimizer)

    def _lora_problems(self, lora: LoraConfig) -> Iterator[Problem]:
        if self.init_from is None:
            yield Problem("init_from", "is required with lora: adapters change weights that were trained", None)
        absent = {"q_proj"} if self.model.q_lora_rank is not None else {"q_a_proj", "q_b_proj"}
        absent |= set() if self.model.n_shared_experts else {"shared_gate_up", "shared_down"}
        missing = sorted(absent & set(lora.targets or ()))
        if missing:
            rule = f"must be projections of the model, which has no {', '.join(missing)}"
            yield Problem("lora.targets", rule, list(lora.targets or ()))

    def _parallel_problems(self, ranks: int) -> Iterator[Problem]:
        parallel, model = self.parallel, self.model
        found = list(parallel.problems_with(ranks))
        yield from found
        if model.n_routed_experts % parallel.expert:
            rule = f"must divide model.n_routed_experts ({model.n_routed_experts})"
            yield Problem("parallel.expert", rule, parallel.expert)
        elif not found and parallel.expert > 1:
            inner = parallel.shard_ranks(ranks) * parallel.context
            widths = (model.hidden_size, 2 * model.moe_intermediate_size)
            if model.n_routed_experts // parallel.expert % inner and any(width % inner for width in widths):
                rule = (
                    f"leaves {inner} ranks (shard * context) to share {model.n_routed_experts // parallel.expert} "
                    f"experts of {widths[0]} x {widths[1]}: one of these must divide into {inner} equal parts"
                )
                yield Problem("parallel.expert", rule, parallel.expert)
        if parallel.context > 1 and self.data.sequence_length % (2 * parallel.context):
            rule = f"must be divisible by 2 * parallel.context ({2 * parallel.context})"
            yield Problem("data.sequence_length", rule, self.data.sequence_length)
