"""FSDP2 communication hooks: compressed gradient reduction with error feedback, and bytes sent by each collective.

They are installed in modules that are sharded already, whose gradients are summed (not averaged) in fp32. With HSDP
(data parallel replicas of sharded models) the all-reduce over replicas can be int8, fp8 or bf16, the reduce-scatter
over shards bf16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultAllocMixin,
    DefaultReduceScatter,
)
from torch.distributed.fsdp._fully_shard._fsdp_common import DDPMeshInfo, FSDPMeshInfo, HSDPMeshInfo
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from cherry.checkpoint.checkpointer import read_state, reader_of
from cherry.distributed.bits import bit_sum
from cherry.distributed.compression import CODECS, Codec, all_reduce, reduce_scatter_bf16
from cherry.job_config import CommunicationConfig
from model.experts import Experts

# The checkpoint's name for residuals; earlier checkpoints have it.
_STORED_RESIDUALS = "unsent"


class TrafficTotals(NamedTuple):
    """Bytes that this rank sent in one optimizer step."""

    by_collective: dict[str, int]
    """Bytes by `axis.kind`."""
    total: int
    reduction_over_fp32: float
    """Bytes of the gradient reduction over those that it would take in fp32."""


class Traffic:
    """Bytes that this rank sends, by mesh axis and kind of collective, since the last `clear`.

    Counted as nccl-tests counts bus bandwidth: of N bytes over R ranks, all-gather, reduce-scatter and all-to-all send
    N (R - 1) / R, an all-reduce twice that. The scalars of a loss, a norm or a count are left out.
    """

    def __init__(self) -> None:
        self._sent: dict[str, int] = {}
        self._reduced = 0
        self._reduced_fp32 = 0

    def clear(self) -> None:
        """Set all counts to zero, before an optimizer step."""
        self._sent.clear()
        self._reduced = self._reduced_fp32 = 0

    def add(self, axis: str, kind: str, sent: int, fp32: int | None = None) -> None:
        """Count one collective.

        Args:
            axis: of the mesh: `shard`, `replicate`, `expert`, ...
            kind: `all_gather`, `reduce_scatter`, `all_reduce` or `all_to_all`.
            sent: bytes.
            fp32: for a collective of the gradient reduction, the bytes that it would send in fp32.
        """
        key = f"{axis}.{kind}"
        self._sent[key] = self._sent.get(key, 0) + sent
        if fp32 is not None:
            self._reduced += sent
            self._reduced_fp32 += fp32

    def totals(self) -> TrafficTotals:
        """Totals since the last `clear`."""
        over_fp32 = self._reduced / self._reduced_fp32 if self._reduced_fp32 else 1.0
        return TrafficTotals(dict(sorted(self._sent.items())), sum(self._sent.values()), over_fp32)


class Communication:
    """State that the hooks of one model share: the byte counter, and the residuals of compressed all-reduces."""

    def __init__(self, network: nn.Module, config: CommunicationConfig) -> None:
        self.traffic = Traffic()
        self.overlap = config.overlap
        self.last = True
        """True during the last micro-batch of an optimizer step: only then are gradients reduced over replicas."""
        self.fingerprints: list[tuple[Tensor, Tensor]] | None = None
        """Fingerprints of this rank's gradients before each reduce-scatter, in order; `None` takes none."""
        self._network = network
        self.reductions: list[_CompressedAllReduce] = []

    def micro_batch(self, *, last: bool) -> None:
        """Prepare for a micro-batch: replicas all-reduce in the `last` of an optimizer step only."""
        if last != self.last and isinstance(self._network, FSDPModule):
            self._network.set_requires_all_reduce(last)
        self.last = last

    def fingerprint(self, gradient: Tensor) -> None:
        """Add the bit sum and the norm of a gradient that is about to be reduced, where they are wanted."""
        if self.fingerprints is not None:
            self.fingerprints.append((bit_sum(gradient), torch.linalg.vector_norm(gradient, dtype=torch.float32)))

    def reset_error_feedback(self) -> None:
        """Drop all residuals (error feedback): after a skipped step, its error belongs to no later step."""
        for reduction in self.reductions:
            reduction.residual_N = None

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Residuals of error feedback for a checkpoint, by parameter: [replicas, *shape], sharded like the parameter.

        Empty without error feedback.
        """
        # torch's staging cannot copy a DTensor on the CPU that begins within a storage.
        residuals = {name: local.clone() if local.is_cpu else local for name, local in self._residuals().items()}
        return {_STORED_RESIDUALS: residuals} if residuals else {}

    def restore(self, uri: str, group: dist.ProcessGroup) -> None:
        """Load the residuals of a checkpoint, so that the run continues bit for bit.

        Residuals that it lacks, or has for another number of replicas, stay zero: one step's rounding error.
        """
        if not (residuals := self._residuals()):
            return
        reader = reader_of(uri)
        stored = reader.read_metadata().state_dict_metadata
        fitting = {
            name: residual
            for name, residual in residuals.items()
            if getattr(stored.get(f"{_STORED_RESIDUALS}.{name}"), "size", None) == residual.shape
        }
        if fitting:
            read_state({_STORED_RESIDUALS: fitting}, reader, group)

    def _residuals(self) -> dict[str, Tensor]:
        return {name: local for reduction in self.reductions for name, local in reduction.residuals().items()}

    @contextmanager
    def exposed(self, device: torch.device) -> Iterator[None]:
        """Context around a collective that exposes it without `overlap`: nothing else runs on the device meanwhile."""
        alone = device.type == "cuda" and not self.overlap
        if alone:
            torch.cuda.synchronize(device)
        yield
        if alone:
            torch.cuda.synchronize(device)


def install(network: nn.Module, config: CommunicationConfig) -> Communication:
    """Install the hooks in a sharded model, once, before its first step and before its state is restored.

    Args:
        network: the sharded root; modules that are no FSDPModule get no hooks.

    Returns:
        State that the installed hooks share.
    """
    communication = Communication(network, config)
    for experts in network.modules():
        if isinstance(experts, Experts) and experts.dispatcher is not None:
            experts.dispatcher.count_bytes(partial(communication.traffic.add, "expert", "all_to_all"))
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    for module, group in _param_groups(network):
        module.set_custom_all_gather(_AllGather(communication))
        if config.reduce_dtype == "bf16" and _shards(group) > 1:  # a single shard would round without sending
            module.set_custom_reduce_scatter(_Bf16ReduceScatter(communication))
        else:
            module.set_custom_reduce_scatter(_ReduceScatter(communication))
        if not isinstance(group.mesh_info, DDPMeshInfo):
            continue
        replicas = group.mesh_info.replicate_process_group
        if config.replicate == "fp32" or replicas.size() == 1:
            module.set_all_reduce_hook(_CountAllReduce(communication, replicas))
        else:
            layout = _layout(group, names)
            hook = _CompressedAllReduce(communication, CODECS[config.replicate], replicas, layout)
            communication.reductions += [hook] if layout and hook.has_error_feedback else []
            _disable_fsdp_all_reduce(group)
            module.set_all_reduce_hook(hook)
    return communication


class _AllGather(DefaultAllGather):
    """FSDP's all-gather of parameters, with its bytes counted."""

    def __init__(self, communication: Communication) -> None:
        self._communication = communication

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        self._communication.traffic.add("shard", "all_gather", (group.size() - 1) * input_tensor.nbytes)
        with self._communication.exposed(input_tensor.device):
            return super().__call__(output_tensor, input_tensor, group, async_op)


class _ReduceScatter(DefaultReduceScatter):
    """FSDP's reduce-scatter of gradients, with its bytes counted."""

    def __init__(self, communication: Communication) -> None:
        self._communication = communication

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work:
        self._communication.fingerprint(input_tensor)
        sent = (group.size() - 1) * output_tensor.nbytes
        self._communication.traffic.add("shard", "reduce_scatter", sent, fp32=sent)
        with self._communication.exposed(input_tensor.device):
            return super().__call__(output_tensor, input_tensor, group, op, async_op)


class _Bf16ReduceScatter(DefaultAllocMixin, ReduceScatter):
    """Reduce-scatter that sends gradients in bf16, sums them in fp32, and returns fp32.

    FSDP allocates a reduction's input and then its output, both of the policy's reduce_dtype (fp32). The input is made
    bf16 here: FSDP rounds while it copies gradients in, which costs neither a pass nor a second buffer.
    """

    def __init__(self, communication: Communication) -> None:
        self._communication = communication
        self._input_given = False

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        assert dtype == torch.float32, "the policy's reduce_dtype must be fp32"
        wanted = torch.float32 if self._input_given else torch.bfloat16
        self._input_given = not self._input_given
        return super().allocate(size, dtype=wanted, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        assert (input_tensor.dtype, output_tensor.dtype) == (torch.bfloat16, torch.float32)
        assert op == dist.ReduceOp.SUM
        assert not async_op
        self._communication.fingerprint(input_tensor)

        def count(kind: str, sent: int, fp32: int) -> None:
            self._communication.traffic.add("shard", kind, sent, fp32)

        with self._communication.exposed(input_tensor.device):
            reduce_scatter_bf16(output_tensor, input_tensor, group, count)


class _CountAllReduce:
    """Hook after FSDP's own fp32 all-reduce over replicas, which counts its bytes."""

    def __init__(self, communication: Communication, group: dist.ProcessGroup) -> None:
        self._communication = communication
        self._ranks = group.size()

    def __call__(self, gradient_N: Tensor) -> None:
        sent = 2 * gradient_N.nbytes * (self._ranks - 1) // self._ranks
        with self._communication.exposed(gradient_N.device):
            self._communication.traffic.add("replicate", "all_reduce", sent, fp32=sent)


class _CompressedAllReduce:
    """Compressed all-reduce of one FSDP parameter group's gradient over replicas, once an optimizer step.

    The residual, a step's rounding error, is added to the next step's gradient (error feedback, arXiv 1901.09847), so
    that rounding does not add up over steps. Gradients of earlier micro-batches are accumulated in the same tensor.
    """

    def __init__(
        self, communication: Communication, codec: Codec, group: dist.ProcessGroup, layout: list[tuple[str, Any]]
    ) -> None:
        self.residual_N: Tensor | None = None
        self.has_error_feedback = codec.limit is not None
        """False for bf16, whose rounding error is far below the gradient's own noise: there is no state."""
        self._communication = communication
        self._codec = codec
        self._group = group
        self._layout = layout

    def __call__(self, gradient_N: Tensor) -> None:
        if gradient_N.is_cuda:
            # FSDP frees it on the reduce-scatter's stream; the next block's may not take its place while this runs.
            gradient_N.record_stream(torch.cuda.current_stream())
        if self.residual_N is not None:
            gradient_N += self.residual_N
        if not self._communication.last:
            self.residual_N = gradient_N.clone()
            gradient_N.zero_()
            return
        with self._communication.exposed(gradient_N.device):
            residual_N = all_reduce(gradient_N, self._codec, self._group, self._count)
        self.residual_N = residual_N if self.has_error_feedback else None

    def _count(self, kind: str, sent: int, fp32: int) -> None:
        self._communication.traffic.add("replicate", kind, sent, fp32)

    def residuals(self) -> dict[str, Tensor]:
        """Views of the residual by parameter [replicas, *shape]; laid out like FSDP's reduce-scatter output."""
        if self.residual_N is None:
            values = sum(param.padded_sharded_param_size.numel() for _, param in self._layout)
            self.residual_N = torch.zeros(values, device=self._layout[0][1].device)
        views: dict[str, Tensor] = {}
        offset = 0
        for name, param in self._layout:
            size = param.sharded_size
            local = self.residual_N[offset : offset + size.numel()].view(1, *size)
            views[name] = _per_replica(local, param.sharded_param, self._group.size())
            offset += param.padded_sharded_param_size.numel()
        assert offset == self.residual_N.numel(), "a parameter had no gradient, so that its group is laid out otherwise"
        return views


def _per_replica(local: Tensor, parameter: DTensor, replicas: int) -> DTensor:
    """DTensor [replicas, *shape] of which each replica holds its own row, sharded like the parameter."""
    mesh = parameter.device_mesh
    shape = torch.Size([replicas, *parameter.shape])
    placements: list[Placement] = []
    for axis, placement in zip(mesh.mesh_dim_names or (), parameter.placements, strict=True):
        if axis == "replicate":
            placements.append(Shard(0))
        elif isinstance(placement, _StridedShard):
            placements.append(_StridedShard(placement.dim + 1, split_factor=placement.split_factor))
        else:
            placements.append(Shard(placement.dim + 1) if isinstance(placement, Shard) else placement)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def _param_groups(network: nn.Module) -> Iterator[tuple[FSDPModule, FSDPParamGroup]]:
    """FSDP modules that have parameters of their own, each with its FSDP parameter group."""
    for module in network.modules():
        if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group) is not None:
            yield module, group


def _shards(group: FSDPParamGroup) -> int:
    return group.mesh_info.shard_mesh_size if isinstance(group.mesh_info, FSDPMeshInfo) else 1


def _layout(group: FSDPParamGroup, names: dict[int, str]) -> list[tuple[str, Any]]:
    """Names and trained parameters of an FSDP parameter group, in the order of its flat gradient."""
    trained = [param for param in group.fsdp_params if param.sharded_param.requires_grad]
    return [(names[id(param.sharded_param)], param) for param in trained]


def _disable_fsdp_all_reduce(group: FSDPParamGroup) -> None:
    """Make FSDP reduce-scatter over the shard axis only; the all-reduce hook that follows sums over replicas.

    FSDP has no switch for that: the group decides by the class of its `mesh_info`; parameters have their own.
    """
    info = group.mesh_info
    assert isinstance(info, HSDPMeshInfo)
    kept = {field.name: getattr(info, field.name) for field in fields(info) if field.init}
    sharded = FSDPMeshInfo(**{**kept, "replicate_mesh_dim": None})
    if group.post_forward_mesh_info == info:  # equal means: reshard to the same mesh
        group.post_forward_mesh_info = sharded
    group.mesh_info = sharded
