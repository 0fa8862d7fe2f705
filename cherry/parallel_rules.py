"""Rules of how parameters, experts and sequences divide among ranks, for the configuration, FSDP2 and the planner."""

from __future__ import annotations

from collections.abc import Sequence


def experts_shard_evenly(experts: int, widths: Sequence[int], ranks: int) -> bool:
    """Whether the experts of an expert parallel rank shard over `ranks` without padding: by expert, or else by width.

    Args:
        widths: the second dimension of each fused expert tensor.
    """
    return experts % ranks == 0 or all(width % ranks == 0 for width in widths)


def shards_by_width(experts: int, width: int, ranks: int, *, expert_parallel: bool) -> bool:
    """Whether FSDP2 shards a fused expert tensor [experts, width, ...] along its width instead of by expert.

    At 2,048 ranks 256 experts sharded by expert would be padded eightfold.

    Args:
        expert_parallel: the tensor is a unit of its own with what expert parallelism leaves to a rank; else it is part
            of its block.
    """
    if width % ranks:
        return False
    return experts % ranks != 0 if expert_parallel else experts < ranks


def sequence_divides(sequence_length: int, context: int) -> bool:
    """Whether context parallelism can split a sequence: each rank takes two chunks of it, an early and a late one."""
    return context == 1 or sequence_length % (2 * context) == 0


# 256 MiB of gradients that other ranks of a node have sent. With less room the host has more launches than time for
# them; with more, memory is lost.
INBOX_VALUES = 2**27
FEW_REPLICAS = 4
"""Replicas of one node that send each other whole gradients instead of reducing fp32 sums."""


def gathers_tokens(ranks: int, experts_per_token: int) -> bool:
    """Whether expert parallel ranks of one node gather all tokens instead of exchanging the rows of experts.

    At twice as many ranks as a token has experts it is twice the bytes of an all-to-all, but beside other work.
    """
    return 1 < ranks <= 2 * experts_per_token


def keeps_working_copies(ranks: int, precision: str, *, cpu_offload: bool, reshard: bool) -> bool:
    """Whether a rank keeps the half-precision copies of its parameters between passes.

    Args:
        ranks: ranks that share or replicate a parameter.
        reshard: whether parameters are freed after a forward pass.
    """
    return (ranks == 1 or not reshard) and precision != "fp32" and not cpu_offload
