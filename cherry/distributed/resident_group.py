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
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo

from cherry.distributed.fsdp_hooks import Communication
from cherry.distributed.inbox import Inbox, aligned
from cherry.distributed.lane import Lane
from cherry.distributed.peer_memory import PeerMemory, can_share
from cherry.optim.adamw import local
from cherry.parallel_rules import FEW_REPLICAS


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
        return sum(map(aligned, self.sizes))

    def summed_by(self, device: torch.device, micro_batches: int) -> dist.ProcessGroup | None:
        """The ranks that send each other gradients through an inbox; `None` where they cannot, or had better not.

        Replicas of whole parameters send them whole: fewer bytes than the fp32 sums that they else reduce, if they
        are few and need no sums over micro-batches.
        """
        if self.ranks > 1:
            return self.process_group if self.peers is not None else None
        few = self.replicas is not None and 1 < self.replicas.size() <= FEW_REPLICAS and micro_batches == 1
        return self.replicas if few and can_share(cast(dist.ProcessGroup, self.replicas), device) else None

    def _offsets(self) -> Iterator[int]:
        return accumulate(map(aligned, self.sizes), initial=0)

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


class ResidentGroup:
    """The parameters of one FSDP unit, resident on this rank.

    Args:
        unit: its parameters are gathered and will not be freed.
        inbox: of the ranks that sum its gradients, where they share memory.
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
            if self._inbox is not None and entries:
                self._post(self._inbox, entries, [parts_SN.expand(self._inbox.ranks, -1) for parts_SN in sent])
            else:
                for entry, parts_SN in zip(entries, sent, strict=True):
                    self._add(entry, self._exchanged(parts_SN).sum(0, dtype=torch.float32))
            self._reduce_replicas(entries)
        for entry in entries:
            entry.resident.grad = None

    def _post(self, inbox: Inbox, entries: Sequence[_Entry], sent: Sequence[Tensor]) -> None:
        """Have the ranks write the parts into each other's inboxes, and sum what comes."""
        from cherry.distributed.triton_sum import sum_parts

        shards = [local(entry.sharded.data) for entry in entries]
        earlier = [entry.sharded in self._sums for entry in entries]
        for entry, shard in zip(entries, shards, strict=True):
            self._sums.setdefault(entry.sharded, shard.new_empty(shard.shape, dtype=torch.float32))
        for (index, first, values, _), received_SN in inbox.exchange(sent):
            last = min(first + values, shards[index].numel())  # without padding
            if last > first:
                total_N = self._sums[entries[index].sharded].view(-1)[first:last]
                own_N = sent[index][inbox.rank, first:last]
                sum_parts(own_N, received_SN[:, : last - first], inbox.rank, total_N, add=earlier[index])

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
        posted = self._inbox is not None and self._unit.ranks == 1
        for entry in entries:
            total = self._sums[entry.sharded]
            size = 2 * total.nbytes * (replicas.size() - 1) // replicas.size()
            if posted:
                sent = (replicas.size() - 1) * total.numel() * entry.own_N.itemsize
                self._communication.traffic.add("replicate", "all_to_all", sent, fp32=size)
            else:
                dist.all_reduce(total, group=replicas)
                self._communication.traffic.add("replicate", "all_reduce", size, fp32=size)

    def _exposed(self) -> Any:
        return self._communication.exposed(self.entries[0].own_N.device)


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


def inboxes_of(units: Sequence[Unit], device: torch.device, micro_batches: int) -> list[Inbox | None]:
    """The inbox of each unit: one for all whose gradients the same ranks of a node sum."""
    groups = [unit.summed_by(device, micro_batches) for unit in units]
    largest: dict[dist.ProcessGroup, int] = {}
    for unit, group in zip(units, groups, strict=True):
        if group is not None:
            largest[group] = max(largest.get(group, 0), unit.values)
    inboxes = {group: Inbox(group, values, device) for group, values in largest.items()}
    return [None if group is None else inboxes[group] for group in groups]
