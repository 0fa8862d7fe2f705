"""Ranks that reduce gradients with every codec, and save what each of them saw for a test to check.

    cherry-launch --nproc_per_node=2|4 tests/dist/reductions.py DIRECTORY

With a GPU for each rank it is NCCL, else gloo.
"""

import os
import sys
from collections import Counter

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save as save_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from cherry.distributed import fsdp_hooks
from cherry.distributed.compression import CODECS, all_reduce
from cherry.job_config import CommunicationConfig

SIZES = (1, 700, 4 * 256 * 3)
STEPS = 16
CONFIGS = {
    "fp32": {},
    "shard bf16": {"reduce_dtype": "bf16"},
    "replicate bf16": {"replicate": "bf16"},
    "replicate int8": {"replicate": "int8"},
    "replicate fp8": {"replicate": "fp8"},
    "both": {"reduce_dtype": "bf16", "replicate": "int8"},
}


def device() -> torch.device:
    own = torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if own else torch.device("cpu")


def flat_gradient(size: int, step: int, rank: int) -> torch.Tensor:
    """Magnitudes over eight decades; the first value of each block is large, so most are below its scale."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    gradient = torch.randn(size, generator=generator) * 10 ** (8 * torch.rand(size, generator=generator) - 8)
    gradient[::256] = 3.0 + rank
    return gradient


def reduce_flat() -> dict:
    """Per codec and size: input, result and residual of every step."""
    group, rank, seen = dist.group.WORLD, dist.get_rank(), {}
    for name, codec in CODECS.items():
        for size in SIZES:
            left, rows, counted = torch.zeros(size, device=device()), [], []
            for step in range(STEPS):
                gradient = flat_gradient(size, step, rank).to(device())
                result = gradient + left
                left = all_reduce(result, codec, group, lambda *count, counted=counted: counted.append(count))
                rows.append((gradient.cpu(), result.cpu(), left.cpu()))
            seen[name, size] = {"steps": rows, "counted": counted[:2]}
        broken = flat_gradient(700, 0, rank)
        if rank == 1:
            broken[[3, 300]] = torch.tensor([float("nan"), float("inf")])
        broken = broken.to(device())
        left = all_reduce(broken, codec, group, lambda *_: None)
        seen[name, "broken"] = (broken.cpu(), left.cpu())
    return seen


class Wire(TorchDispatchMode):
    """Bytes that this rank sends, as torch's dispatcher sees the collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith("c10d::"):
            others = dist.ProcessGroup.unbox(args[1 if name == "c10d::allreduce_" else 2]).size() - 1
            if name == "c10d::_allgather_base_":
                self.sent["all_gather"] += args[1].nbytes * others
            elif name == "c10d::_reduce_scatter_base_":
                self.sent["reduce_scatter"] += args[0].nbytes * others
            elif name == "c10d::alltoall_base_":
                self.sent["all_to_all"] += args[1].nbytes * others // (others + 1)
            else:
                assert name == "c10d::allreduce_", name
                self.sent["all_reduce"] += 2 * sum(tensor.nbytes for tensor in args[0]) * others // (others + 1)
        return func(*args, **(kwargs or {}))


def build(mesh, settings):
    """Layers whose rows no two ranks can share evenly."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(37, 51), nn.Tanh(), nn.Linear(51, 1, bias=False))
    network.to(device())
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for module in (network[0], network[2], network):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    return network, fsdp_hooks.install(network, CommunicationConfig(**settings))


def gradients(network, hooked, micro_batches):
    """Whole gradients by name, after one step."""
    rank = dist.get_rank()
    for part in range(micro_batches):
        hooked.micro_batch(last=part == micro_batches - 1)
        generator = torch.Generator().manual_seed(10 * part + rank)
        network(torch.randn(8, 37, generator=generator).to(device())).sum().backward()
    found = {name: parameter.grad.full_tensor().cpu() for name, parameter in network.named_parameters()}
    network.zero_grad()
    return found


def reduce_model(directory: str) -> dict:
    """Per config: whole gradients, residuals, bytes by both counts, and the residuals that a new model restores."""
    ranks, seen = dist.get_world_size(), {}
    for name, settings in CONFIGS.items():
        replicas = 2 if ranks == 4 or "replicate" in settings else 1
        mesh = init_device_mesh(device().type, (replicas, ranks // replicas), mesh_dim_names=("replicate", "shard"))
        network, hooked = build(mesh, settings)
        with Wire() as wire:
            for parts in range(3):
                hooked.micro_batch(last=parts == 2)
                network(torch.ones(2, 37, device=device())).sum().backward()
        network.zero_grad()
        hooked.reset_error_feedback()
        row = {"totals": hooked.traffic.totals()._asdict(), "wire": dict(wire.sent)}
        row["one"] = gradients(network, hooked, 1)
        hooked.reset_error_feedback()
        row["gradients"] = gradients(network, hooked, 3)
        row["residuals"] = whole(hooked)
        if row["residuals"]:
            uri = f"{directory}/{settings['replicate']}-{settings.get('reduce_dtype')}"
            save_state(hooked.state(), checkpoint_id=uri)
            _, again = build(mesh, settings)
            again.restore(uri, dist.group.WORLD)
            row["restored"] = whole(again)
        seen[name] = row
    return seen


def whole(hooked):
    # "unsent" is the name in checkpoints: it must not change.
    return {name: residual.full_tensor().cpu() for name, residual in hooked.state().get("unsent", {}).items()}


def main() -> None:
    cuda = device().type == "cuda"
    if cuda:
        torch.cuda.set_device(device())
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    seen = {"flat": reduce_flat(), "model": reduce_model(sys.argv[1])}
    torch.save(seen, f"{sys.argv[1]}/rank-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
