"""Parameters of one FSDP unit that stay gathered between passes: gathered and reduced in place, without copies.

FSDP2 casts and copies shards into a buffer, gathers that, and copies it out to the parameters, in every pass; gradients
go the same way back, widened to fp32. Here the optimizer writes this rank's new values in half precision straight into
its part of the gathered parameter, which the others then gather from there. A gradient is sent in its own type to the
rank that owns the part, once, and summed in fp32: the same bits as widening before the sum.

Both run on a stream of their own, unit by unit: a gather while the units before it compute, a reduction while the
backward pass goes on. GPUs of one node write into each other's memory by their copy engines (peer_memory.py); other
ranks use NCCL or gloo. This file knows FSDP2's units from inside (torch 2.11 to 2.13).

Shapes: S ranks that share a parameter, N values of a rank's part with padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo
from torch.distributed.tensor import DTensor

from cherry.distributed.fsdp_hooks import Communication
from cherry.distributed.peer_memory import PeerMemory, can_share
from cherry.optim.adamw import local


class Lane:
    """A stream beside the main one, for communication; on a CPU everything is done at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._given = False
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    @contextmanager
    def after_main(self) -> Iterator[None]:
        """Context whose work runs beside the main stream, after what that has been given so far."""
        if self._stream is None:
            yield
            return
        self._given = True
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> Callable[[], None]:
        """Function that makes the main stream wait for what has been given so far, called within `after_main`."""
        if self._stream is None:
            return lambda: None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return lambda: torch.cuda.current_stream().wait_event(event)

    def join(self) -> None:
        """Make the main stream wait for all that was given since the last time."""
        if self._stream is not None and self._given:
            self._given = False
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
    offset: int
    """Where this rank's part begins among those of the unit, in values; the parameter, times the number of ranks."""


class Unit:
    """One FSDP unit, its ranks, and where its gathered parameters lie. Make it before FSDP gathers them first."""

    def __init__(self, module: FSDPModule, device: torch.device) -> None:
        state = module._get_fsdp_state()
        assert state._fsdp_param_group is not None
        self.module, self.group = module, state._fsdp_param_group
        info = self.group.mesh_info
        self.ranks = info.shard_mesh_size if isinstance(info, FSDPMeshInfo) else 1
        self.rank = info.shard_mesh_rank if isinstance(info, FSDPMeshInfo) else 0
        self.replicas = info.replicate_process_group if isinstance(info, HSDPMeshInfo) else None
        self.sizes = [param.padded_sharded_param_size.numel() for param in self.group.fsdp_params]
        """Values of a rank's part of each parameter."""
        self.peers: PeerMemory | None = None
        cut = any(param.fsdp_placement.dim for param in self.group.fsdp_params)
        if self.ranks > 1 and not cut and can_share(self.process_group, device):
            dtype = self.group.mp_policy.param_dtype
            assert dtype is not None, "only half-precision copies are resident"
            self.peers = PeerMemory(self.process_group, self.ranks * self.values, dtype, device)
            self._give_memory(self.peers)

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The ranks that share the parameters."""
        return self.group._all_gather_process_group

    @property
    def values(self) -> int:
        """Values of a rank's parts together, with what aligns them."""
        return sum(map(_aligned, self.sizes))

    def _offsets(self) -> Iterator[int]:
        return accumulate(map(_aligned, self.sizes), initial=0)

    def _give_memory(self, peers: PeerMemory) -> None:
        """Have FSDP gather the parameters into this memory, and never free it."""
        for param, size, offset in zip(self.group.fsdp_params, self.sizes, self._offsets(), strict=False):
            param.all_gather_outputs = [peers.own(self.ranks * offset, self.ranks * size)]
            for name in ("alloc_all_gather_outputs", "free_unsharded_param"):
                setattr(param, name, lambda: None)

    def entries(self) -> list[_Entry]:
        """The parameters, gathered."""
        params = zip(self.group.fsdp_params, self._offsets(), strict=False)
        return [self._entry(param, offset) for param, offset in params]

    def _entry(self, param: Any, offset: int) -> _Entry:
        parts_SN = param.all_gather_outputs[0].view(self.ranks, -1)
        cut = param.fsdp_placement.dim
        own_N = parts_SN[self.rank]
        if cut and self.ranks > 1:
            parts_SN, own_N = parts_SN.new_empty(0), torch.empty_like(own_N)
        return _Entry(param.sharded_param, param.unsharded_param, parts_SN, own_N, cut, offset)


class Inbox:
    """Where the other ranks of a node write the gradients that this rank owns, for two units in turn.

    Args:
        units: those that use it, all of one group of ranks.
    """

    def __init__(self, units: Sequence[Unit], device: torch.device) -> None:
        values, senders = max(unit.values for unit in units), units[0].ranks - 1
        self._memory = PeerMemory(units[0].process_group, 2 * senders * values, torch.bfloat16, device)
        self._boxes = [piece.view(2, senders, values) for piece in self._memory.ranks]
        self._turn = 0

    def open(self) -> list[Tensor]:
        """The boxes [S - 1, values] of all ranks, a row a sender, once nobody reads them any more."""
        self._turn = 1 - self._turn
        self._memory.barrier(self._turn)
        return [boxes[self._turn] for boxes in self._boxes]

    def close(self) -> None:
        """Let the stream go on when all have written."""
        self._memory.barrier(2 + self._turn)


class ResidentGroup:
    """The parameters of one FSDP unit, resident on this rank.

    Args:
        unit: its parameters are gathered and will not be freed.
        inbox: of the unit's ranks, where they share memory.
        sums: gets the reduced gradient of each fp32 parameter: this rank's part, fp32, over all micro-batches.
        prepare: called when the gathered parameters of a step are first used, with the resident parameters.
    """

    def __init__(
        self,
        unit: Unit,
        inbox: Inbox | None,
        lane: Lane,
        communication: Communication,
        sums: dict[nn.Parameter, Tensor],
        prepare: Callable[[Sequence[nn.Parameter]], None],
    ) -> None:
        self._unit, self._inbox, self._lane, self._communication = unit, inbox, lane, communication
        self._sums, self._prepare = sums, prepare
        self._gathered: Callable[[], None] | None = None
        """Makes the main stream wait for this step's gather; `None` once it has."""
        self.entries = unit.entries()
        self._wait, self._post_backward = unit.group.wait_for_unshard, unit.group.post_backward
        setattr(unit.group, "wait_for_unshard", self._wait_for_parameters)  # noqa: B010
        setattr(unit.group, "post_backward", self._reduce_after_backward)  # noqa: B010

    @property
    def reduces(self) -> bool:
        """Whether gradients are of several ranks."""
        return self._unit.ranks > 1 or (self._unit.replicas is not None and self._unit.replicas.size() > 1)

    def low_precision(self, entry: _Entry) -> Tensor:
        """This rank's part of a resident parameter, of the shard's shape, for the optimizer to write."""
        shape = local(entry.sharded.data).shape
        return entry.own_N[: shape.numel()].view(shape)

    def gather(self) -> None:
        """Gather the parts that the optimizer wrote; the unit's next pass waits for that."""
        trained = [entry for entry in self.entries if entry.sharded.requires_grad]
        self._gathered = lambda: None
        if self._unit.ranks > 1 and trained:
            with self._lane.after_main(), self._exposed():
                if self._unit.peers is not None:
                    self._give(self._unit.peers, trained)
                else:
                    self._gather(trained)
                self._gathered = self._lane.mark()
            for entry in trained:
                self._communication.traffic.add("shard", "all_gather", (self._unit.ranks - 1) * entry.own_N.nbytes)

    def _give(self, peers: PeerMemory, trained: Sequence[_Entry]) -> None:
        """Write this rank's parts into the other ranks' memory; none of them still reads what was there before."""
        peers.barrier(0)
        for rank in _others(self._unit):
            for entry in trained:
                first = self._unit.ranks * entry.offset + self._unit.rank * len(entry.own_N)
                peers.ranks[rank][first : first + len(entry.own_N)].copy_(entry.own_N, non_blocking=True)
        peers.barrier(1)

    def _gather(self, trained: Sequence[_Entry]) -> None:
        process_group, ranks = self._unit.process_group, self._unit.ranks
        targets = [
            entry.parts_SN if entry.parts_SN.numel() else entry.own_N.new_empty(ranks, len(entry.own_N))
            for entry in trained
        ]
        with _together(process_group, trained[0].own_N.device):
            for entry, target_SN in zip(trained, targets, strict=True):
                dist.all_gather_into_tensor(target_SN.view(-1), entry.own_N, group=process_group)
        for entry, target_SN in zip(trained, targets, strict=True):
            if not entry.parts_SN.numel():
                _join(local(entry.resident.data), target_SN, entry.cut)

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
            for parts_SN in sent if self._unit.ranks > 1 else ():
                self._communication.fingerprint(parts_SN)
                values = (self._unit.ranks - 1) * parts_SN.shape[1]
                size = values * parts_SN.itemsize
                self._communication.traffic.add("shard", "reduce_scatter", size, fp32=4 * values)
            if self._inbox is not None and self._unit.peers is not None and entries:
                self._post(self._inbox, entries, sent)
            else:
                for entry, parts_SN in zip(entries, sent, strict=True):
                    self._add(entry, self._exchanged(parts_SN).sum(0, dtype=torch.float32))
            self._reduce_replicas(entries)
        for entry in entries:
            entry.resident.grad = None

    def _post(self, inbox: Inbox, entries: Sequence[_Entry], sent: Sequence[Tensor]) -> None:
        """Write the parts into their owners' boxes, and sum what came."""
        from cherry.distributed.triton_sum import sum_parts

        boxes, own = inbox.open(), self._unit.rank
        for rank in _others(self._unit):
            for entry, parts_SN in zip(entries, sent, strict=True):
                row = own - (own > rank)  # an owner sends itself nothing
                target_N = boxes[rank][row, entry.offset : entry.offset + parts_SN.shape[1]]
                target_N.copy_(parts_SN[rank], non_blocking=True)
        inbox.close()
        for entry, parts_SN in zip(entries, sent, strict=True):
            size = local(entry.sharded.data).numel()
            received_SN = boxes[own][:, entry.offset : entry.offset + size]
            earlier = self._sums.get(entry.sharded)
            earlier_N = None if earlier is None else earlier.view(-1)
            shape = local(entry.sharded.data).shape
            self._sums[entry.sharded] = sum_parts(parts_SN[own, :size], received_SN, own, earlier_N).view(shape)

    def _exchanged(self, parts_SN: Tensor) -> Tensor:
        """The parts of this rank's values that each rank has, [S, N]."""
        if self._unit.ranks == 1:
            return parts_SN
        received_SN = torch.empty_like(parts_SN)
        dist.all_to_all_single(received_SN, parts_SN, group=self._unit.process_group)
        return received_SN

    def _parts(self, entry: _Entry) -> Tensor:
        """A gradient in parts [S, N], one a rank, padded with zeros."""
        assert entry.resident.grad is not None
        grad, ranks = local(entry.resident.grad), self._unit.ranks
        self._lane.keep(grad)
        if entry.cut and ranks > 1:
            grad = torch.cat([part.flatten() for part in grad.chunk(ranks, entry.cut)])
        if missing := ranks * len(entry.own_N) - grad.numel():
            grad = F.pad(grad.flatten(), (0, missing))
        return grad.reshape(ranks, -1)

    def _add(self, entry: _Entry, total_N: Tensor) -> None:
        shard = local(entry.sharded.data)
        total = total_N[: shard.numel()].view(shard.shape)
        earlier = self._sums.get(entry.sharded)
        self._sums[entry.sharded] = total if earlier is None else earlier.add_(total)

    def _reduce_replicas(self, entries: Sequence[_Entry]) -> None:
        """Sum over replicas, once an optimizer step."""
        replicas = self._unit.replicas
        if replicas is None or replicas.size() == 1 or not self._communication.last:
            return
        for entry in entries:
            total = self._sums[entry.sharded]
            dist.all_reduce(total, group=replicas)
            size = 2 * total.nbytes * (replicas.size() - 1) // replicas.size()
            self._communication.traffic.add("replicate", "all_reduce", size, fp32=size)

    def _exposed(self) -> Any:
        return self._communication.exposed(self.entries[0].own_N.device)


def _aligned(values: int) -> int:
    """Values up to the next whole 256 bytes, where matmuls and copies want tensors to begin."""
    return -(-values // 128) * 128


def _others(unit: Unit) -> list[int]:
    """The other ranks of a unit, the next one first: so that not all write to the same."""
    return [(unit.rank + step) % unit.ranks for step in range(1, unit.ranks)]


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


def units_of(network: nn.Module, device: torch.device) -> list[Unit]:
    """The FSDP units of a network that have parameters of their own, in the order of use."""
    return [
        Unit(module, device)
        for module in network.modules()
        if isinstance(module, FSDPModule) and module._get_fsdp_state()._fsdp_param_group is not None
    ]


def inboxes_of(units: Sequence[Unit], device: torch.device) -> dict[dist.ProcessGroup, Inbox]:
    """An inbox for each group of ranks that share memory."""
    sharing: dict[dist.ProcessGroup, list[Unit]] = {}
    for unit in units:
        if unit.peers is not None:
            sharing.setdefault(unit.process_group, []).append(unit)
    return {group: Inbox(members, device) for group, members in sharing.items()}


def sharded_like(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """The part of a rank as the tensor that the fp32 parameter is: of its mesh, or plain."""
    if not isinstance(parameter.data, DTensor):
        return part
    spec = parameter.data
    return DTensor.from_local(
        part, spec.device_mesh, spec.placements, run_check=False, shape=spec.shape, stride=spec.stride()
    )
