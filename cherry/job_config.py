"""The configuration of a training job: data, parallelism, communication, optimization, checkpoints and launch.

The docstrings of keys are the user's documentation: they are the descriptions in the JSON schema. No torch is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from base.config import Matches, Problem, Section
from base.sizes import Size
from cherry.parallel_rules import experts_shard_evenly, sequence_divides
from cherry.train_config import LoraConfig, ProfileConfig, TrainConfig
from model.model_config import ModelConfig

NETWORK_VARIABLE = "CHERRY_NETWORK"
"""Environment variable in which a rank finds its cluster's settings, as JSON; see `over_network`."""
_VARIABLE_RULE = "must be a variable in capitals that begins with NCCL_, TORCH_NCCL_, GLOO_, UCX_ or FI_"
_NAME_RULE = "must be lower-case letters, digits and dashes, at most 63, and begin with a letter or a digit"
# Files that hold a pickled state dict; all other weights are safetensors folders.
PICKLED_WEIGHTS = (".pt", ".pth", ".bin")


def weights_folder(uri: str) -> str:
    """Folder of given weights, which holds their config.json and tokenizer; of a .pt file, the one it lies in."""
    return (uri.rpartition("/")[0] or ".") if uri.endswith(PICKLED_WEIGHTS) else uri


class DataConfig(Section):
    """Documents and how they are packed into token sequences of one length."""

    source: str = "python-stdlib"
    """`python-stdlib` (the embedded default), or a file, directory or glob, as a path or URI: text, JSON lines, JSON
    arrays, CSV or Parquet, also compressed by gzip, bzip2 or xz."""
    format: Literal["auto", "text", "jsonl", "chat"] = "auto"
    """Format of the documents. `auto` goes by what each file holds: records, or else one document. `text` takes every
    file as one. `jsonl` is records only; `chat` is records with `messages`, and only the assistant's tokens count in
    the loss."""
    text_key: str = "text"
    """Key of the text in a record, or its column."""
    tokenizer: str | None = None
    """Path or URI of a tokenizer.json, or of a folder that holds one. `null` takes the one beside the weights of
    `init_from`; without given weights it trains a byte-level BPE of model.vocab_size on the training split."""
    chat_template: str | None = None
    """Path or URI of a Jinja chat template for data.format chat; `null` takes the one beside the tokenizer, else a
    default. It is exported with the weights."""
    sequence_length: PositiveInt = 512
    """Tokens in a training sequence."""
    heldout_fraction: float = Field(default=0.02, gt=0.0, lt=1.0)
    """Fraction of the documents that are held out for evaluation."""
    max_documents: PositiveInt | None = None
    """Use at most this many documents, chosen by the seed; `null` uses all."""
    tokenizer_sample_bytes: Size = 8_000_000
    """Bytes of text that a tokenizer is trained on, when none is given."""
    fim_rate: float = Field(default=0.0, ge=0.0, le=1.0)
    """Fraction of the training documents that are rearranged to prefix, suffix, middle, for fill-in-the-middle training
    (DeepSeek-V3, arXiv 2412.19437, section 4.1, uses 0.1)."""
    cross_document_attention: bool = True
    """Whether a token attends to earlier documents of its packed sequence, as in DeepSeek-V3 (section 4.1). `false`
    masks them, restarts positions at each document and leaves targets across a boundary out of the loss."""
    seed: NonNegativeInt = 0
    """Seed of the choice of documents and of the training and held-out split."""

    def problems(self) -> Iterator[Problem]:
        """Problem with fill-in-the-middle, which would cut up conversations."""
        if self.fim_rate and self.format == "chat":
            yield Problem("fim_rate", "must be 0 with data.format chat: turns are not filled in", self.fim_rate)


class ParallelConfig(Section):
    """The device mesh: replicate x shard x context x expert, with neighbouring ranks on the last axis.

    The product of the four must be the number of ranks. `replicate`, `shard` and `expert` are data parallel too: their
    ranks each read their own sequences; `context` ranks share a sequence. Dense parameters are sharded over shard x
    context x expert (FSDP2). A layer's experts are split over `expert` first, then sharded over shard x context.
    """

    replicate: PositiveInt = 1
    """Replicas of all shards (HSDP)."""
    shard: PositiveInt | None = None
    """Ranks that parameters are sharded over (FSDP); `null` takes all ranks that the other axes leave."""
    expert: PositiveInt = 1
    """Expert parallel ranks: each holds some of a layer's experts, and tokens are dispatched and combined by
    all-to-all."""
    expert_ranks_per_node: PositiveInt | None = None
    """Expert parallel ranks on one node; `null` takes as many as are launched on each. With several nodes, a token is
    sent to each node at most once, and from there to its experts."""
    context: PositiveInt = 1
    """Context parallel ranks, which split the positions of a sequence."""
    reshard_after_forward: bool | PositiveInt = True
    """Free a block's gathered parameters after its forward pass. A number keeps them sharded over that many ranks until
    the backward pass (the ranks of a node, so that the second all-gather stays inside it); experts are always freed.
    `false` keeps them: in bf16 and fp8 from step to step, for two bytes a parameter and rank, which is the fastest; in
    fp32, or with states on the CPU, until the backward pass."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer states in host memory; blocks are copied to the GPU for use."""

    def shard_ranks(self, ranks: int) -> int:
        """Size of the `shard` axis."""
        return self.shard or ranks // (self.replicate * self.expert * self.context)

    def experts_on_node(self, ranks_per_node: int) -> int:
        """Expert parallel ranks on one node; all of them where they do not divide into nodes."""
        on_node = self.expert_ranks_per_node or ranks_per_node
        return on_node if self.expert % on_node == 0 else self.expert

    def data_ranks(self, ranks: int) -> int:
        """Number of data parallel ranks: those that read sequences of their own."""
        return ranks // self.context

    def problems_with(self, ranks: int) -> Iterator[Problem]:
        """Problems of the axis sizes with the number of ranks; keys are relative to the whole configuration."""
        axes = {"replicate": self.replicate, "expert": self.expert, "context": self.context}
        if self.expert_ranks_per_node is not None and self.expert % self.expert_ranks_per_node:
            rule = f"must divide parallel.expert ({self.expert})"
            yield Problem("parallel.expert_ranks_per_node", rule, self.expert_ranks_per_node)
        alone = [name for name, size in axes.items() if ranks % size]
        for name in alone:
            yield Problem(f"parallel.{name}", f"must divide the number of ranks ({ranks})", axes[name])
        others = self.replicate * self.expert * self.context
        rule = f"replicate * shard * expert * context must be the number of ranks ({ranks})"
        if not alone and self.shard is None and ranks % others:
            yield Problem("parallel", f"{rule}; replicate * expert * context must divide it", others)
        elif not alone and self.shard is not None and others * self.shard != ranks:
            yield Problem("parallel.shard", f"{rule}, and the others give {others}", self.shard)
        elif not alone:
            sharded = self.shard_ranks(ranks) * self.context * self.expert
            if not isinstance(self.reshard_after_forward, bool) and sharded % self.reshard_after_forward:
                rule = f"a number must divide the ranks that share a parameter ({sharded})"
                yield Problem("parallel.reshard_after_forward", rule, self.reshard_after_forward)


class NetworkConfig(Section):
    """NCCL, gloo and the network that they use. What a job leaves out, its cluster's file decides."""

    backend: Literal["nccl", "gloo"] | None = None
    """Communication library: nccl on GPUs, gloo on CPUs; `null` takes what the device needs. A host without GPUs
    refuses nccl, one with GPUs gloo."""
    buffer_size: Size | None = None
    """NCCL's buffer size per channel, in bytes or like `8MiB` or `256MB`; `null` is NCCL's own default, 4 MiB."""
    max_channels: PositiveInt | None = None
    """Maximum number of NCCL channels, each of which takes an SM from computation; `null` is NCCL's own default."""
    interface: str | None = None
    """Network interface of NCCL and gloo, like `eth0`; `null` lets them choose, and on given hosts takes the one that
    ssh reached."""
    environment: dict[Annotated[str, Matches(r"^(NCCL|TORCH_NCCL|GLOO|UCX|FI)_[A-Z0-9_]+$", _VARIABLE_RULE)], str] = (
        Field(default_factory=dict)
    )
    """Other environment variables of NCCL, gloo or their network plug-ins, like `NCCL_IB_HCA: mlx5`."""
    timeout_s: PositiveFloat | None = None
    """Timeout in seconds of a collective in any process group, after which the job ends; `null` is torch's default
    (NCCL 600, gloo 1800). Ranks also wait for each other while one prepares data or writes its part of a checkpoint."""

    def variables(self) -> dict[str, str]:
        """Environment variables for the communication libraries; those that are set already take precedence."""
        named = {
            "NCCL_BUFFSIZE": self.buffer_size,
            "NCCL_MAX_NCHANNELS": self.max_channels,
            "NCCL_SOCKET_IFNAME": self.interface,
            "GLOO_SOCKET_IFNAME": self.interface,
        }
        return {**{name: str(value) for name, value in named.items() if value is not None}, **self.environment}

    def given(self) -> dict[str, Any]:
        """The keys that are set, as JSON values."""
        return {key: value for key, value in self.model_dump(mode="json").items() if value not in (None, {})}


def over_network(own: Mapping[str, Any] | None, network: Mapping[str, Any]) -> dict[str, Any]:
    """A job's `communication` section over its cluster's: a key that the job sets is the job's.

    Args:
        own: as it was read, not validated yet.
        network: `NetworkConfig.given` of the cluster.
    """
    own = own or {}
    merged = {**network, **{key: value for key, value in own.items() if value is not None or key not in network}}
    inner = [section.get("environment") for section in (network, own)]
    if all(isinstance(section, Mapping) for section in inner):
        merged["environment"] = {**(inner[0] or {}), **(inner[1] or {})}
    return merged


class CommunicationConfig(NetworkConfig):
    """Gradient reduction and the communication libraries. Any of it may change on a resume."""

    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of gradients in the reduce-scatter on the shard axis. Sums and gradient accumulation are fp32 either way."""
    replicate: Literal["fp32", "bf16", "int8", "fp8"] = "fp32"
    """Type of gradients in the all-reduce on the replicate axis. int8 and fp8 have a scale per 256 values and error
    feedback: the residual of a step is added to the next one's gradient."""
    overlap: bool = True
    """Overlap communication with computation. `false` is slower, and shows what communication costs."""


class CheckpointConfig(Section):
    """Checkpoints: interval, directory, and how many are kept."""

    every_steps: PositiveInt = 50
    """Steps between two checkpoints."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    keep_every_steps: PositiveInt | None = None
    """Also keep, for good, the checkpoints of steps that are multiples of this; `null` keeps only the newest."""
    asynchronous: bool = True
    """Write checkpoints in the background, from a copy in host memory."""
    directory: str | None = None
    """Directory of the checkpoints, a path or URI; `null` is `train/checkpoints` in the run directory."""


class LaunchConfig(Section):
    """Ranks of the job, as in torchrun."""

    nproc_per_node: PositiveInt = 1
    """Ranks on each node."""
    nnodes: PositiveInt = 1
    """Number of nodes."""
    master_port: PositiveInt | None = None
    """Port of the rendezvous on the first node; `null` picks a free one, but torchrun's 29500 for several nodes that a
    provider other than ssh starts. Provider ssh picks a fresh one for each attempt."""


class JobConfig(Section):
    """A training job: the sections of a run's configuration that `train.py` reads."""

    name: Annotated[str, Matches(r"^[a-z0-9][a-z0-9-]{0,62}$", _NAME_RULE)]
    """Name of the run, and of its directory: lower-case letters, digits and dashes."""
    seed: NonNegativeInt = 0
    """Seed of the initial weights and of the order of the data."""
    init_from: str | None = None
    """Weights to start from: a Hugging Face safetensors folder or URI; `null` starts from random weights."""
    model: ModelConfig
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    communication: CommunicationConfig = CommunicationConfig()
    train: TrainConfig = TrainConfig()
    lora: LoraConfig | None = None
    """Train only low-rank adapters, on frozen weights from `init_from`; `null` trains all parameters."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    launch: LaunchConfig = LaunchConfig()

    def problems(self) -> Iterator[Problem]:
        """Problems with combinations of keys of several sections."""
        ranks = self.launch.nproc_per_node * self.launch.nnodes
        data_ranks = self.parallel.data_ranks(ranks)
        micro = max(1, data_ranks) * self.train.gradient_accumulation_steps
        if self.train.batch_size % micro:
            shown = "ranks" if self.parallel.context == 1 else "ranks / parallel.context"
            rule = (
                f"must be divisible by {shown} * train.gradient_accumulation_steps "
                f"({data_ranks} * {self.train.gradient_accumulation_steps} = {micro})"
            )
            yield Problem("train.batch_size", rule, self.train.batch_size)
        yield from self._parallel_problems(ranks)
        if self.communication.replicate != "fp32" and self.parallel.replicate == 1:
            rule = "compresses between replicas, and parallel.replicate is 1"
            yield Problem("communication.replicate", rule, self.communication.replicate)
        if self.data.sequence_length > self.model.max_position_embeddings:
            rule = f"must be at most model.max_position_embeddings ({self.model.max_position_embeddings})"
            yield Problem("data.sequence_length", rule, self.data.sequence_length)
        if self.train.profile is not None:
            yield from self._profile_problems(self.train.profile, ranks)
        if self.train.warmup_steps >= self.train.steps:
            yield Problem(
                "train.warmup_steps", f"must be below train.steps ({self.train.steps})", self.train.warmup_steps
            )
        if self.data.tokenizer is None and self.init_from is None and self.model.vocab_size < 512:
            rule = "a byte-level BPE needs 256 byte tokens, special tokens and merges: at least 512"
            yield Problem("model.vocab_size", rule, self.model.vocab_size)
        if self.train.optimizer == "muon":
            yield from self._muon_problems()
        if self.lora is not None:
            yield from self._lora_problems(self.lora)

    def problems_apart(self) -> Iterator[Problem]:
        """Problems on hosts that share no file system: paths that only one of them would have.

        The documents are none of them, where prepared data is copied to every host.
        """
        from base import storage  # fsspec, which `cherry --help` does without

        checkpoints = self.checkpoint.directory
        if checkpoints is None or storage.is_local(checkpoints):
            rule = "must be a URI of an object store, like s3://bucket/tiny"
            yield Problem("checkpoint.directory", rule, checkpoints)
        if self.init_from is not None and storage.is_local(self.init_from):
            yield Problem("init_from", "must be a URI of an object store", self.init_from)

    def _profile_problems(self, profile: ProfileConfig, ranks: int) -> Iterator[Problem]:
        if profile.steps[1] > self.train.steps:
            rule = f"must end at most at train.steps ({self.train.steps})"
            yield Problem("train.profile.steps", rule, list(profile.steps))
        if wrong := [rank for rank in profile.ranks if rank >= ranks]:
            rule = f"must be below the number of ranks ({ranks}), counted from 0"
            yield Problem("train.profile.ranks", rule, wrong)

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
            if not experts_shard_evenly(model.n_routed_experts // parallel.expert, widths, inner):
                rule = (
                    f"leaves {inner} ranks (shard * context) to share {model.n_routed_experts // parallel.expert} "
                    f"experts of {widths[0]} x {widths[1]}: one of these must divide into {inner} equal parts"
                )
                yield Problem("parallel.expert", rule, parallel.expert)
        if not sequence_divides(self.data.sequence_length, parallel.context):
            rule = f"must be divisible by 2 * parallel.context ({2 * parallel.context})"
            yield Problem("data.sequence_length", rule, self.data.sequence_length)
