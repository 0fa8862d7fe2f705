"""Owns what is planned: one model on one layout of ranks, and where the members of each group of ranks sit.

It knows nothing of memory or time. A rank's number is ((replicate * shard + s) * context + c) * expert + e, as in
cherry/distributed/mesh.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from base.config import Problem
from base.errors import ConfigError
from cherry.cluster import ClusterSpec
from cherry.hardware import GPUS, NCCL_BUFFER_BYTES, NCCL_CHANNELS, Gpu, Reach, reach_of
from cherry.job_config import JobConfig, LoraConfig
from model.model_config import ModelConfig

_TYPE_BYTES = {"fp32": 4, "bf16": 2, "fp8": 2}
"""Bytes of a parameter's gathered copy and of an activation; with fp8, matmuls alone take narrower operands."""


# int8 and fp8 have a scale per 256 values: 0.2545 of fp32's bytes (benchmarks/results/compression.jsonl).
_REPLICATE_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 4 * 0.2545, "fp8": 4 * 0.2545}


@dataclass(frozen=True)
class Group:
    """Ranks that talk with each other, and how many of them share a node."""

    ranks: int
    on_node: int

    @property
    def nodes(self) -> int:
        """Nodes that the group spans."""
        return -(-self.ranks // self.on_node)


@dataclass(frozen=True)
class Workload:
    """Everything that memory and time depend on."""

    model: ModelConfig
    gpu: Gpu
    gpus_per_node: int
    replicate: int
    shard: int
    context: int
    expert: int
    micro_sequences: int
    """Sequences that a rank's forward pass takes at one time (with context ranks: parts of them)."""
    accumulation: int
    sequence_length: int
    precision: str
    recompute: str
    """`none` or `full`."""
    compile: bool = False
    moment_bytes: int = 4
    optimizer: str = "adamw"
    newton_schulz_steps: int = 5
    """Of Muon."""
    loss_chunk_tokens: int = 1024
    kept_share: float = 0.0
    """Of a gathered block, what stays between its passes: nothing, all, or its part in a group of some ranks."""
    reduce_bytes: int = 4
    replicate_bytes: float = 4.0
    """Of a gradient's element between replicas."""
    cpu_offload: bool = False
    assumed_imbalance: float = 1.0
    """Rows of the busiest rank's experts over the mean, where ranks share out experts."""
    nccl_bytes: int = NCCL_CHANNELS * NCCL_BUFFER_BYTES
    """Of buffers in one direction of one communicator."""
    lora: LoraConfig | None = None
    expert_ranks_per_node: int | None = None
    """Where experts lie on several nodes: ranks of each, to which a token goes once
    (cherry/distributed/expert_parallel_nodes.py). `None` sends it once for each expert."""
    fused_exchange: bool = False
    """By kernels like DeepEP's, which reach more of the adapters than NCCL's all-to-all; for comparison with what
    others have measured."""

    @cached_property
    def ranks(self) -> int:
        """All of them."""
        return self.replicate * self.shard * self.context * self.expert

    @cached_property
    def tokens(self) -> int:
        """Of a rank's forward pass."""
        return self.micro_sequences * self.sequence_length // self.context

    @property
    def batch_sequences(self) -> int:
        """Of an optimizer step over all ranks."""
        return self.micro_sequences * self.accumulation * self.ranks // self.context

    @cached_property
    def dense_shards(self) -> int:
        """Ranks that share a dense parameter."""
        return self.shard * self.context * self.expert

    @cached_property
    def expert_shards(self) -> int:
        """Ranks that share each of a rank's own experts."""
        return self.shard * self.context

    @cached_property
    def imbalance(self) -> float:
        """The same, of this layout."""
        return self.assumed_imbalance if self.expert > 1 else 1.0

    @property
    def once_per_node(self) -> bool:
        """Whether a token goes to each node once."""
        on_node = self.expert_ranks_per_node
        return on_node is not None and on_node < self.expert and self.expert % on_node == 0

    @cached_property
    def nodes_of_a_token(self) -> float:
        """Nodes that a token's experts lie on, by chance; a group of experts lies on one node where it can."""
        model = self.model
        open_nodes = max(1.0, self.expert_group.nodes * model.topk_group / model.n_group)
        return open_nodes * (1.0 - (1.0 - 1.0 / open_nodes) ** model.num_experts_per_tok)

    @cached_property
    def alone(self) -> bool:
        """Whether working copies of the parameters stay between passes (cherry/distributed/fsdp.py, `keeps_copies`)."""
        on_gpu = not self.gpu.shared_memory
        return on_gpu and self.ranks == 1 and self.precision != "fp32" and not self.cpu_offload

    @cached_property
    def unsharded(self) -> bool:
        """One CPU rank, on which nothing is sharded at all."""
        return self.gpu.shared_memory and self.ranks == 1

    @cached_property
    def type_bytes(self) -> int:
        """Of an activation, a gathered parameter and its gradient."""
        return _TYPE_BYTES[self.precision]

    @cached_property
    def reach(self) -> Reach:
        """What programs reach on this device."""
        return reach_of(self.gpu)

    @cached_property
    def dense_group(self) -> Group:
        """Ranks that gather a dense parameter."""
        return self._group(self.dense_shards, stride=1)

    @cached_property
    def expert_group(self) -> Group:
        """Ranks that deal out the experts of a layer."""
        return self._group(self.expert, stride=1)

    @cached_property
    def expert_shard_group(self) -> Group:
        """Ranks that gather the same experts."""
        return self._group(self.expert_shards, stride=self.expert)

    @cached_property
    def context_group(self) -> Group:
        """Ranks that share a sequence."""
        return self._group(self.context, stride=self.expert)

    @cached_property
    def replicate_group(self) -> Group:
        """Ranks that hold copies of the same shard."""
        return self._group(self.replicate, stride=self.dense_shards)

    def _group(self, ranks: int, *, stride: int) -> Group:
        return Group(ranks, max(1, min(ranks, self.gpus_per_node // stride)))


def workload_of(config: JobConfig, cluster: ClusterSpec, gpu: Gpu | None = None) -> Workload:
    """A job on a cluster.

    Args:
        gpu: the device, where it is known better than by the cluster's spec.

    Raises:
        ConfigError: the job's ranks are not the cluster's.
    """
    found = [str(problem) for problem in cluster_problems(config, cluster, gpu or GPUS[cluster.hardware])]
    if found:
        raise ConfigError("the job does not go on the cluster\n" + "\n".join(f"  {line}" for line in found))
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
        moment_bytes=_TYPE_BYTES[train.optimizer_state_dtype],
        optimizer=train.optimizer,
        newton_schulz_steps=train.muon.newton_schulz_steps,
        loss_chunk_tokens=train.loss_chunk_tokens,
        # True is freed, False is kept whole, a number is kept in parts of so many.
        kept_share=0.0 if parallel.reshard_after_forward is True else 1.0 / max(1, int(parallel.reshard_after_forward)),
        reduce_bytes=_TYPE_BYTES[config.communication.reduce_dtype],
        replicate_bytes=_REPLICATE_BYTES[config.communication.replicate],
        cpu_offload=parallel.cpu_offload,
        assumed_imbalance=cluster.assumed_imbalance,
        nccl_bytes=_nccl_bytes(config),
        lora=config.lora,
        expert_ranks_per_node=parallel.expert_ranks_per_node or config.launch.nproc_per_node,
    )


def _nccl_bytes(config: JobConfig) -> int:
    size = int(config.communication.variables().get("NCCL_BUFFSIZE", NCCL_BUFFER_BYTES))
    return size * min(NCCL_CHANNELS, config.communication.max_channels or NCCL_CHANNELS)


def cluster_problems(config: JobConfig, cluster: ClusterSpec, device: Gpu) -> Iterator[Problem]:
    """What the job asks for and the cluster has not."""
    launch = config.launch
    if cluster.kind == "nodes":
        for key, asked, there in (
            ("nnodes", launch.nnodes, cluster.nodes),
            ("nproc_per_node", launch.nproc_per_node, cluster.gpus_per_node),
        ):
            if asked > there:
                yield Problem(f"launch.{key}", f"the cluster has {there}", asked)
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
