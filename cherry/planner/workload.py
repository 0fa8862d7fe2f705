"""Workload of a plan: one model on one parallel layout, and how the ranks of each process group are placed on nodes.

A rank's number is ((replicate * shard + s) * context + c) * expert + e, as in
cherry/distributed/mesh.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from base.config import Problem
from base.errors import ConfigError
from cherry import parallel_rules
from cherry.cluster import ClusterSpec
from cherry.hardware import GPUS, NCCL_BUFFER_BYTES, NCCL_CHANNELS, Efficiency, Gpu, efficiency_of
from cherry.job_config import JobConfig
from cherry.train_config import LoraConfig, TrainConfig
from model.model_config import ModelConfig

_TYPE_BYTES = {"fp32": 4, "bf16": 2, "fp8": 2}
"""Bytes of an unsharded parameter and of an activation; with fp8, only matmuls take narrower operands."""


# int8 and fp8 have a scale per 256 values: 0.2545 of fp32's bytes (benchmarks/results/compression.jsonl).
_REPLICATE_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 4 * 0.2545, "fp8": 4 * 0.2545}


@dataclass(frozen=True)
class Group:
    """A process group: its size, and how many of its ranks share a node."""

    ranks: int
    on_node: int

    @property
    def nodes(self) -> int:
        """Nodes that the group spans."""
        return -(-self.ranks // self.on_node)


@dataclass(frozen=True)
class Workload:
    """Model, device and layout: everything that memory and time depend on."""

    model: ModelConfig
    gpu: Gpu
    gpus_per_node: int
    replicate: int
    shard: int
    context: int
    expert: int
    micro_sequences: int
    """Sequences of a rank's micro-batch; with context parallelism each context group shares them."""
    accumulation: int
    sequence_length: int
    precision: str
    recompute: str
    """`none` or `full`."""
    compile: bool = False
    moment_bytes: int = 4
    optimizer: str = "adamw"
    newton_schulz_steps: int = 5
    """Iterations of Muon's orthogonalization."""
    loss_chunk_tokens: int = 1024
    kept_share: float = 0.0
    """Fraction of a block's parameters kept from forward to backward: 0, 1 (unsharded), or 1/n (resharded over n)."""
    reduce_bytes: int = 4
    replicate_bytes: float = 4.0
    """Bytes per gradient element in the all-reduce between replicas."""
    cpu_offload: bool = False
    assumed_imbalance: float = 1.0
    """EP load imbalance: routed rows of the busiest EP rank over the mean."""
    nccl_bytes: int = NCCL_CHANNELS * NCCL_BUFFER_BYTES
    """Bytes of NCCL's buffers of one communicator in one direction."""
    lora: LoraConfig | None = None
    expert_ranks_per_node: int | None = None
    """EP ranks per node when a token is sent to each node once (cherry/distributed/expert_parallel_nodes.py); `None`
    sends it once for each expert."""
    fused_all_to_all: bool = False
    """All-to-all by fused kernels like DeepEP's instead of NCCL; for comparison with what others have measured."""

    @cached_property
    def ranks(self) -> int:
        """Number of ranks of the job."""
        return self.replicate * self.shard * self.context * self.expert

    @cached_property
    def tokens(self) -> int:
        """Tokens of a rank's micro-batch."""
        return self.micro_sequences * self.sequence_length // self.context

    @property
    def batch_sequences(self) -> int:
        """Sequences of an optimizer step over all ranks."""
        return self.micro_sequences * self.accumulation * self.ranks // self.context

    @cached_property
    def dense_shards(self) -> int:
        """Ranks that shard a dense parameter."""
        return self.shard * self.context * self.expert

    @cached_property
    def expert_shards(self) -> int:
        """Ranks that shard the experts of one EP rank."""
        return self.shard * self.context

    @cached_property
    def imbalance(self) -> float:
        """EP load-imbalance factor of this layout: 1.0 without expert parallelism."""
        return self.assumed_imbalance if self.expert > 1 else 1.0

    @property
    def once_per_node(self) -> bool:
        """Whether the dispatch sends a token to each node once, and from there to its experts."""
        on_node = self.expert_ranks_per_node
        return on_node is not None and on_node < self.expert and self.expert % on_node == 0

    @cached_property
    def nodes_of_a_token(self) -> float:
        """Expected number of nodes that hold a token's experts; a routing group is on one node where possible."""
        model = self.model
        eligible = max(1.0, self.expert_group.nodes * model.topk_group / model.n_group)
        return eligible * (1.0 - (1.0 - 1.0 / eligible) ** model.num_experts_per_tok)

    @cached_property
    def keeps_working_copies(self) -> bool:
        """Whether working copies of the parameters stay between passes; one CPU rank has nothing sharded at all."""
        on_gpu = not self.gpu.shared_memory
        return on_gpu and parallel_rules.keeps_working_copies(
            self.ranks, self.precision, cpu_offload=self.cpu_offload, reshard=self.kept_share < 1
        )

    @property
    def reshard_after_forward(self) -> bool | int:
        """What the configuration says of parameters after a forward pass: `kept_share` in its terms."""
        return True if self.kept_share == 0 else False if self.kept_share == 1 else round(1 / self.kept_share)

    @cached_property
    def gathers_tokens(self) -> bool:
        """Whether experts' ranks gather all tokens, by copy engine (cherry/distributed/expert_gather.py)."""
        near = self.expert_group.nodes == 1 and not self.gpu.shared_memory
        return near and parallel_rules.gathers_tokens(self.expert, self.model.num_experts_per_tok)

    @cached_property
    def posts_gradients(self) -> bool:
        """Whether the ranks that sum a gradient write it into each other's memory, by copy engine."""
        if not self.keeps_working_copies:
            return False
        if self.dense_shards > 1:
            return self.dense_group.nodes == 1
        few = self.replicate <= parallel_rules.FEW_REPLICAS and self.accumulation == 1
        return few and self.replicate_group.nodes == 1

    @cached_property
    def keeps_gradients(self) -> bool:
        """Whether gradients stay in the type of the working copies until the optimizer reads them: nobody sums them."""
        return self.keeps_working_copies and self.ranks == 1 and self.accumulation == 1

    @cached_property
    def unsharded(self) -> bool:
        """Whether the job is one CPU rank, on which nothing is sharded at all."""
        return self.gpu.shared_memory and self.ranks == 1

    @cached_property
    def type_bytes(self) -> int:
        """Bytes per element of an activation, an unsharded parameter and its gradient."""
        return _TYPE_BYTES[self.precision]

    @cached_property
    def efficiency(self) -> Efficiency:
        """Achieved efficiency on this device."""
        return efficiency_of(self.gpu)

    @cached_property
    def dense_group(self) -> Group:
        """Group that all-gathers dense parameters."""
        return self._group(self.dense_shards, stride=1)

    @cached_property
    def expert_group(self) -> Group:
        """Expert parallel group: ranks that split the experts of a layer."""
        return self._group(self.expert, stride=1)

    @cached_property
    def expert_shard_group(self) -> Group:
        """Group that all-gathers the experts of one EP rank."""
        return self._group(self.expert_shards, stride=self.expert)

    @cached_property
    def context_group(self) -> Group:
        """Context parallel group: ranks that share a sequence."""
        return self._group(self.context, stride=self.expert)

    @cached_property
    def replicate_group(self) -> Group:
        """Data parallel group of HSDP: ranks with copies of the same shard."""
        return self._group(self.replicate, stride=self.dense_shards)

    def _group(self, ranks: int, *, stride: int) -> Group:
        return Group(ranks, max(1, min(ranks, self.gpus_per_node // stride)))


def workload_of(config: JobConfig, cluster: ClusterSpec, gpu: Gpu | None = None) -> Workload:
    """The workload of a job on a cluster.

    Args:
        gpu: device to plan for in place of the cluster spec's.

    Raises:
        ConfigError: the job asks for what the cluster does not have.
    """
    found = [str(problem) for problem in cluster_problems(config, cluster, gpu or GPUS[cluster.hardware])]
    if found:
        raise ConfigError("the job does not fit the cluster\n" + "\n".join(f"  {line}" for line in found))
    ranks = config.launch.nproc_per_node * config.launch.nnodes
    parallel, train = config.parallel, config.train
    return Workload(
        model=config.model,
        gpu=gpu or GPUS[cluster.hardware],
        gpus_per_node=config.launch.nproc_per_node,
        replicate=parallel.replicate,
        shard=parallel.shard_ranks(ranks),
        context=parallel.context,
        expert=parallel.expert,
        micro_sequences=train.batch_size // (parallel.data_ranks(ranks) * train.gradient_accumulation_steps),
        accumulation=train.gradient_accumulation_steps,
        sequence_length=config.data.sequence_length,
        precision=train.precision,
        recompute=train.activation_checkpointing,
        compile=train.compile,
        moment_bytes=moment_bytes(train),
        optimizer=train.optimizer,
        newton_schulz_steps=train.muon.newton_schulz_steps,
        loss_chunk_tokens=train.loss_chunk_tokens,
        # True reshards fully, False not at all, a number over so many ranks.
        kept_share=0.0 if parallel.reshard_after_forward is True else 1.0 / max(1, int(parallel.reshard_after_forward)),
        reduce_bytes=_TYPE_BYTES[config.communication.reduce_dtype],
        replicate_bytes=_REPLICATE_BYTES[config.communication.replicate],
        cpu_offload=parallel.cpu_offload,
        assumed_imbalance=cluster.assumed_imbalance,
        nccl_bytes=_nccl_bytes(config),
        lora=config.lora,
        expert_ranks_per_node=parallel.expert_ranks_per_node or config.launch.nproc_per_node,
    )


def moment_bytes(train: TrainConfig) -> int:
    """Bytes of one number of the optimizer's state."""
    return _TYPE_BYTES[train.optimizer_state_dtype]


def _nccl_bytes(config: JobConfig) -> int:
    size = int(config.communication.variables().get("NCCL_BUFFSIZE", NCCL_BUFFER_BYTES))
    return size * min(NCCL_CHANNELS, config.communication.max_channels or NCCL_CHANNELS)


def cluster_problems(config: JobConfig, cluster: ClusterSpec, device: Gpu) -> Iterator[Problem]:
    """Problems with a job on a cluster: nodes, GPUs or a precision that the cluster does not have."""
    launch = config.launch
    if cluster.kind == "nodes":
        for key, asked, available in (
            ("nnodes", launch.nnodes, cluster.node_count),
            ("nproc_per_node", launch.nproc_per_node, cluster.node_gpus),
        ):
            if asked > available:
                yield Problem(f"launch.{key}", f"the cluster has {available}", asked)
        axes = config.parallel.replicate * config.parallel.expert * config.parallel.context
        if cluster.gpus % axes:
            rule = f"replicate * expert * context must divide the cluster's {cluster.gpus} GPUs"
            yield Problem("parallel", rule, axes)
    elif launch.nnodes != 1:
        yield Problem(
            "launch.nnodes",
            "the cluster is one machine; name another's spec: --cluster, or the key cluster",
            launch.nnodes,
        )
    if config.train.precision not in device.precisions:
        rule = f"{device.name} computes in {', '.join(device.precisions)}"
        yield Problem("train.precision", rule, config.train.precision)
