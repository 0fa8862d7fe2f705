"""Owns how long collectives take: rings inside and across nodes, and all-to-all.

It knows nothing of what else runs meanwhile. Rates are a link's or an adapter's by the data sheet times what NCCL
reaches; a ring over several nodes crosses each node's border once, with the adapters of all its members there.
"""

from __future__ import annotations

from cherry.hardware import COLLECTIVE_S, LINK_HOP_S, NETWORK_HOP_S
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


def all_to_all_seconds(work: Workload, group: Group, sent_bytes: float) -> float:
    """An all-to-all in which each rank sends as much to every rank of the group, `sent_bytes` with its own part."""
    if group.ranks == 1 or sent_bytes <= 0:
        return 0.0
    near = sent_bytes * (group.on_node - 1) / group.ranks / (work.gpu.link_rate * work.reach.link)
    if group.nodes == 1:
        return COLLECTIVE_S + near
    far = sent_bytes * (group.ranks - group.on_node) / group.ranks / (work.gpu.network_rate * work.reach.exchange)
    return COLLECTIVE_S + NETWORK_HOP_S + max(near, far)


def exchange_seconds(work: Workload, row_bytes: float) -> tuple[float, float]:
    """An all-to-all of a micro-batch's routed rows, each of `row_bytes`: inside its node, and across.

    The busiest rank gets more than the mean, and all wait for it. Where both parts run at the same time, the second
    figure is what the first does not hide.
    """
    group, model = work.expert_group, work.model
    if group.ranks == 1:
        return 0.0, 0.0
    rows = work.tokens * work.imbalance
    chosen = model.num_experts_per_tok
    near = rows * chosen * row_bytes * (group.on_node - 1) / (group.on_node if work.once_per_node else group.ranks)
    inside = COLLECTIVE_S + near / (work.gpu.link_rate * work.reach.link)
    if group.nodes == 1:
        return inside, 0.0
    copies = work.nodes_of_a_token if work.once_per_node else float(chosen)
    reach = work.reach.exchange_once if work.fused_exchange else work.reach.exchange
    away = rows * copies * row_bytes * (group.nodes - 1) / group.nodes
    across = NETWORK_HOP_S + away / (work.gpu.network_rate * reach)
    # To a node and then inside it is one after the other, but for kernels that do both at a time.
    one_after_the_other = work.once_per_node and not work.fused_exchange
    return inside, across if one_after_the_other else max(0.0, across - inside)
