"""A self-check of each rank's device, as a trainer hook: small matmuls, attention and experts with known bits.

A device that computes wrongly now and then is found without waiting for a spike: the same workload must give the
bits of its first time, and those of the other ranks with the same device.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from base.errors import HardwareError
from cherry.distributed.bits import bit_sum
from cherry.hooks.protocol import TrainerHook
from cherry.train_record import TrainRecord
from model.experts import Experts

_SEED = 20261129
_EXPERTS = 8
# On a GPU a product of 2,048 x 2,048 has 256 tiles of 128 x 128, more than there are multiprocessors: each takes part.
_WIDTHS = {"cuda": 2048, "cpu": 256}


class SelfCheck(TrainerHook):
    """Runs the workload on every rank after each `every_steps` steps, and compares its bits.

    Args:
        print_line: prints a line for people.
    """

    def __init__(self, every_steps: int, device: torch.device, print_line: Callable[[str], None]) -> None:
        self._every_steps = every_steps
        self._device = device
        self._print_line = print_line
        self._inputs = _inputs(device)
        self._first = self.compute()

    def on_step_end(self, record: TrainRecord) -> None:
        """Check, if it is due.

        Raises:
            HardwareError: on every rank, where some rank's bits are others; it names rank and host.
        """
        if record.step % self._every_steps == 0 and (error := self.check(record.step)) is not None:
            self._print_line(str(error))
            raise error

    def check(self, step: int) -> HardwareError | None:
        """The error that names the ranks whose bits are others than the first time, or than most ranks'."""
        now = self.compute()
        mine = (now != self._first, _kind(self._device), tuple(self._first), socket.gethostname())
        found: list[tuple[bool, str, tuple[int, ...], str]] = [mine] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        wrong = {rank for rank, (changed, *_) in enumerate(found) if changed}
        for kind in {kind for _, kind, _, _ in found}:
            of_kind = {rank: bits for rank, (_, own, bits, _) in enumerate(found) if own == kind}
            usual, count = Counter(of_kind.values()).most_common(1)[0]
            # Without a majority any of them may be wrong.
            wrong |= {rank for rank, bits in of_kind.items() if bits != usual or 2 * count <= len(of_kind) != 1}
        if not wrong:
            return None
        hosts = tuple(dict.fromkeys(found[rank][3] for rank in sorted(wrong)))
        where = ", ".join(f"rank {rank} (host {found[rank][3]})" for rank in sorted(wrong))
        return HardwareError(
            f"self-check after step {step}: the same small workload gave other bits on {where}. Test the devices "
            "there, or leave the host out; checkpoints since the last self-check that passed may be spoiled.",
            hosts,
        )

    def compute(self) -> list[int]:
        """Fingerprints of the workload's results: a matmul, causal attention, experts and their gradients."""
        a_MM, b_MM, heads_BHTK, experts = self._inputs
        attended_BHTK = F.scaled_dot_product_attention(heads_BHTK, heads_BHTK, heads_BHTK, is_causal=True)
        counts_E = torch.full((_EXPERTS,), len(a_MM) // _EXPERTS, device=self._device)
        with torch.enable_grad():
            weight_M = torch.ones(len(a_MM), device=self._device)
            out_MM = experts.run(a_MM, weight_M, counts_E)
            gradients = torch.autograd.grad(out_MM, list(experts.parameters()), b_MM)
        results: list[Tensor] = [a_MM @ b_MM, attended_BHTK, out_MM, *gradients]
        bits: list[int] = torch.stack([bit_sum(result) for result in results]).tolist()
        return bits


def _inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Experts]:
    width = _WIDTHS[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(_SEED)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    experts = Experts(_EXPERTS, width, width // 4).to(device, dtype)
    for parameter in experts.parameters():
        parameter.data = random(*parameter.shape) / width**0.5
    return random(width, width), random(width, width), random(1, width // 64, width // 4, 64), experts


def _kind(device: torch.device) -> str:
    """What decides a workload's bits: the device's model, torch, and a CPU's instruction set and threads."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"CPU with {capability}, {threads} threads, torch {torch.__version__}"
