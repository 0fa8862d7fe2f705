"""Owns how long collectives take: rings inside and across nodes, and all-to-all.

It knows nothing of what else runs meanwhile. Rates are a link's or an adapter's by the data sheet times what NCCL
reaches; a ring over several nodes crosses each node's border once, with the adapters of all its members there.
"""

from __future__ import annotations

from cherry.planner.hardware import COLLECTIVE_S, LINK_HOP_S, NETWORK_HOP_S
from cherry.planner.workload import Group, Workload


def ring_seconds(work: Workload, group: Group, total_bytes: float) -> float:
    """An all-gather to, or a reduce-scatter from, `total_bytes` on every rank of the group."""
    if group.ranks == 1 or total_bytes <= 0:
        return 0.0
    link = work.gpu.link_rate * work.reach.link
    rate, hops = link, (group.ranks - 1) * LINK_HOP_S
    if group.nodes > 1:
        network = work.gpu.network_rate * work.reach.network * group.on_node
        rate = min(link, network) if group.on_node > 1 else network
        hops = (group.nodes - 1) * NETWORK_HOP_S + (group.ranks - group.nodes) * LINK_HOP_S
    return COLLECTIVE_S + hops + total_bytes * (group.ranks - 1) / group.ranks / rate


def all_reduce_seconds(work: Workload, group: Group, total_bytes: float) -> float:
    """A reduce-scatter and an all-gather."""
    return 2 * ring_seconds(work, group, total_bytes)


def exchange_seconds(work: Workload, group: Group, sent_bytes: float) -> tuple[float, float]:
    """An all-to-all in which a rank sends `sent_bytes` evenly to all of its group: inside its node, and across.

    Both run at the same time; the second figure is what the first does not hide.
    """
    if group.ranks == 1:
        return 0.0, 0.0
    near = sent_bytes * (group.on_node - 1) / group.ranks
    inside = COLLECTIVE_S + near / (work.gpu.link_rate * work.reach.link)
    if group.nodes == 1:
        return inside, 0.0
    away = sent_bytes * (group.ranks - group.on_node) / group.ranks
    across = NETWORK_HOP_S + away / (work.gpu.network_rate * work.reach.exchange)
    return inside, max(0.0, across - inside)
