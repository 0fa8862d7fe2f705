"""Parameters of one FSDP unit that stay gathered between passes: gathered and reduced in place, without copies.

FSDP2 casts and copies shards into a buffer, gathers that, and copies it out to the parameters, in every pass; gradients
go the same way back, widened to fp32. Here the optimizer writes this rank's new values in half precision straight into
its part of the gathered parameter, which the others then gather from there. A gradient is sent in its own type to the
rank that owns the part, once, and summed in fp32: the same bits as widening before the sum.

Both run on a stream of their own, unit by unit: a gather while the units before it compute, a reduction while the
backward pass goes on. This file knows FSDP2's units from inside (torch 2.11 to 2.13).

Shapes: S ranks that share a parameter, N values of a rank's part with padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor

from cherry.distributed.fsdp_hooks import Communication
from cherry.optim.adamw import local


class Lane:
    """A stream beside the main one, for communication; on a CPU everything is done at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    @contextmanager
    def after_main(self) -> Iterator[None]:
        """Context whose work runs beside the main stream, after what that has been given so far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> Callable[[], None]:
        """Function that makes the main stream wait for what has been given so far, called within `after_main`."""
        if self._stream is None:
            return lambda: None
        event = torch.cuda.Event()
        event.record(self._stream)
        return lambda: torch.cuda.current_stream().wait_event(event)

    def join(self) -> None:
        """Make the main stream wait for all of it."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def keep(self, tensor: Tensor) -> None:
        """Keep the main stream's memory of a tensor until the work that was given here is done with it."""
        if self._stream is not None:
            tensor.record_stream(self._stream)


class _Entry(NamedTuple):
    """One parameter: the fp32 shard, the gathered one, and the latter's memory in parts, one a rank."""

    sharded: nn.Parameter
    resident: nn.Parameter
    parts_SN: Tensor
    own_N: Tensor
    """This rank's part, where the optimizer writes."""
    cut: int
    """The dimension that is shared out. Parts of another than the first are no memory of the parameter."""


class ResidentGroup:
    """The parameters of one FSDP unit, resident on this rank.

    Args:
        module: an FSDP module whose parameters are gathered and will not be freed.
        sums: gets the reduced gradient of each fp32 parameter: this rank's part, fp32, over all micro-batches.
        prepare: called when the gathered parameters of a step are first used, with the resident parameters.
    """

    def __init__(
        self,
        module: FSDPModule,
        lane: Lane,
        communication: Communication,
        sums: dict[nn.Parameter, Tensor],
        prepare: Callable[[Sequence[nn.Parameter]], None],
    ) -> None:
        found = module._get_fsdp_state()._fsdp_param_group
        assert found is not None
        self._group, self._lane, self._communication = found, lane, communication
        self._sums, self._prepare = sums, prepare
        info = found.mesh_info
        self._ranks = info.shard_mesh_size if isinstance(info, FSDPMeshInfo) else 1
        self._rank = info.shard_mesh_rank if isinstance(info, FSDPMeshInfo) else 0
        self._replicas = info.replicate_process_group if isinstance(info, HSDPMeshInfo) else None
        self._gathered: Callable[[], None] | None = None
        """Makes the main stream wait for this step's gather; `None` once it has."""
        self.entries = [self._entry(param) for param in found.fsdp_params]
        self._wait, self._post_backward = found.wait_for_unshard, found.post_backward
        setattr(found, "wait_for_unshard", self._wait_for_parameters)  # noqa: B010
        setattr(found, "post_backward", self._reduce_after_backward)  # noqa: B010

    @property
    def reduces(self) -> bool:
        """Whether gradients are of several ranks."""
        return self._ranks > 1 or (self._replicas is not None and self._replicas.size() > 1)

    def _entry(self, param: Any) -> _Entry:
        parts_SN = param.all_gather_outputs[0].view(self._ranks, -1)
        cut = param.fsdp_placement.dim
        own_N = parts_SN[self._rank]
        if cut and self._ranks > 1:
            parts_SN, own_N = parts_SN.new_empty(0), torch.empty_like(own_N)
        return _Entry(param.sharded_param, param.unsharded_param, parts_SN, own_N, cut)

    def low_precision(self, entry: _Entry) -> Tensor:
        """This rank's part of a resident parameter, of the shard's shape, for the optimizer to write."""
        shape = local(entry.sharded.data).shape
        return entry.own_N[: shape.numel()].view(shape)

    def gather(self) -> None:
        """Gather the parts that the optimizer wrote; the unit's next pass waits for that."""
        trained = [entry for entry in self.entries if entry.sharded.requires_grad]
        if self._ranks > 1 and trained:
            process_group = self._group._all_gather_process_group
            with self._lane.after_main(), self._exposed():
                targets = [
                    entry.parts_SN if entry.parts_SN.numel() else entry.own_N.new_empty(self._ranks, len(entry.own_N))
                    for entry in trained
                ]
                with _together(process_group, trained[0].own_N.device):
                    for entry, target_SN in zip(trained, targets, strict=True):
                        dist.all_gather_into_tensor(target_SN.view(-1), entry.own_N, group=process_group)
                        sent = (self._ranks - 1) * entry.own_N.nbytes
                        self._communication.traffic.add("shard", "all_gather", sent)
                for entry, target_SN in zip(trained, targets, strict=True):
                    if not entry.parts_SN.numel():
                        _join(local(entry.resident.data), target_SN, entry.cut)
                self._gathered = self._lane.mark()
        else:
            self._gathered = lambda: None

    def _wait_for_parameters(self) -> None:
        """What FSDP does before it uses the unit's parameters, in either pass."""
        self._wait()
        self.finish_gather()

    def finish_gather(self) -> None:
        """Make the main stream wait for the gather, if there is one that nobody waited for, and prepare for passes."""
        if self._gathered is not None:
            gathered, self._gathered = self._gathered, None
            gathered()
            self._prepare([entry.resident for entry in self.entries])

    def _reduce_after_backward(self, *unused: Any) -> None:
        """What FSDP does after the unit's backward pass, and the reduction of its gradients."""
        self._post_backward(*unused)
        if self.reduces:
            self.reduce([entry for entry in self.entries if entry.resident.grad is not None])

    @torch.no_grad()
    def reduce(self, entries: Sequence[_Entry]) -> None:
        """Send the gradients of these parameters to the ranks that own the parts, and add the sums up in fp32."""
        with self._lane.after_main(), self._exposed():
            sent = [self._parts(entry) for entry in entries]
            received = [torch.empty_like(parts_SN) for parts_SN in sent] if self._ranks > 1 else sent
            if self._ranks > 1:
                process_group = self._group._reduce_scatter_process_group
                for parts_SN, received_SN in zip(sent, received, strict=True):
                    self._communication.fingerprint(parts_SN)
                    dist.all_to_all_single(received_SN, parts_SN, group=process_group)
                    values = (self._ranks - 1) * parts_SN.shape[1]
                    size = values * parts_SN.itemsize
                    self._communication.traffic.add("shard", "reduce_scatter", size, fp32=4 * values)
            for entry, received_SN in zip(entries, received, strict=True):
                self._add(entry, received_SN)
        for entry in entries:
            entry.resident.grad = None

    def _parts(self, entry: _Entry) -> Tensor:
        """A gradient in parts [S, N], one a rank, padded with zeros."""
        assert entry.resident.grad is not None
        grad = local(entry.resident.grad)
        self._lane.keep(grad)
        if entry.cut and self._ranks > 1:
            grad = torch.cat([part.flatten() for part in grad.chunk(self._ranks, entry.cut)])
        return F.pad(grad.flatten(), (0, self._ranks * len(entry.own_N) - grad.numel())).view(self._ranks, -1)

    def _add(self, entry: _Entry, received_SN: Tensor) -> None:
        shard = local(entry.sharded.data)
        total = received_SN.sum(0, dtype=torch.float32)[: shard.numel()].view(shard.shape)
        earlier = self._sums.get(entry.sharded)
        total = total if earlier is None else earlier.add_(total)
        if self._replicas is not None and self._replicas.size() > 1 and self._communication.last:
            dist.all_reduce(total, group=self._replicas)
            size = 2 * total.nbytes * (self._replicas.size() - 1) // self._replicas.size()
            self._communication.traffic.add("replicate", "all_reduce", size, fp32=size)
        self._sums[entry.sharded] = total

    def _exposed(self) -> Any:
        return self._communication.exposed(self.entries[0].own_N.device)


def _join(full: Tensor, parts_SN: Tensor, cut: int) -> None:
    """Set a parameter from the parts of its dimension `cut`."""
    shape = list(full.shape)
    shape[cut] //= parts_SN.shape[0]
    torch.cat([part.view(shape) for part in parts_SN], cut, out=full)


@contextmanager
def _together(group: dist.ProcessGroup, device: torch.device) -> Iterator[None]:
    """Context whose collectives NCCL starts as one kernel; the current stream goes on after them."""
    if device.type != "cuda":
        yield
        return
    with dist._coalescing_manager(group=group, device=device, async_ops=True) as work:  # type: ignore[attr-defined]
        yield
    work.wait()


def groups_of(network: nn.Module) -> Iterator[tuple[FSDPModule, FSDPParamGroup]]:
    """FSDP modules that have parameters of their own, each with its group, in the order of use."""
    for module in network.modules():
        if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group) is not None:
            yield module, group


def sharded_like(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """The part of a rank as the tensor that the fp32 parameter is: of its mesh, or plain."""
    if not isinstance(parameter.data, DTensor):
        return part
    spec = parameter.data
    return DTensor.from_local(
        part, spec.device_mesh, spec.placements, run_check=False, shape=spec.shape, stride=spec.stride()
    )
