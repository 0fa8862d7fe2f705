"""Time of collectives: ring all-gather, reduce-scatter and all-reduce, and the all-to-all of expert parallelism.

Rates are a link's or an adapter's by the data sheet times NCCL's achieved efficiency; a ring over several nodes crosses
each node's border once, with the adapters of all its members there.
"""

from __future__ import annotations

from cherry.hardware import COLLECTIVE_S, LINK_HOP_S, NETWORK_HOP_S
from cherry.planner.workload import Group, Workload


def ring_seconds(work: Workload, group: Group, total_bytes: float) -> float:
    """Seconds of a ring all-gather to, or reduce-scatter from, `total_bytes` on every rank of the group."""
    if group.ranks == 1 or total_bytes <= 0:
        return 0.0
    link = work.gpu.link_rate * work.efficiency.link
    rate, hops = link, (group.ranks - 1) * LINK_HOP_S
    if group.nodes > 1:
        network = work.gpu.network_rate * work.efficiency.network * group.on_node
        rate = min(link, network) if group.on_node > 1 else network
        hops = (group.nodes - 1) * NETWORK_HOP_S + (group.ranks - group.nodes) * LINK_HOP_S
    return COLLECTIVE_S + hops + total_bytes * (group.ranks - 1) / group.ranks / rate


def all_reduce_seconds(work: Workload, group: Group, total_bytes: float) -> float:
    """Seconds of a ring all-reduce: a reduce-scatter and an all-gather."""
    return 2 * ring_seconds(work, group, total_bytes)


def even_all_to_all_seconds(work: Workload, group: Group, sent_bytes: float) -> float:
    """Seconds of an all-to-all in which each rank sends equal parts of `sent_bytes` to all ranks, itself included."""
    if group.ranks == 1 or sent_bytes <= 0:
        return 0.0
    near = sent_bytes * (group.on_node - 1) / group.ranks / (work.gpu.link_rate * work.efficiency.link)
    if group.nodes == 1:
        return COLLECTIVE_S + near
    rate = work.gpu.network_rate * work.efficiency.all_to_all
    far = sent_bytes * (group.ranks - group.on_node) / group.ranks / rate
    return COLLECTIVE_S + NETWORK_HOP_S + max(near, far)


def all_to_all_seconds(work: Workload, row_bytes: float) -> tuple[float, float]:
    """Seconds of a micro-batch's dispatch or combine, in rows of `row_bytes`: intra-node, and across nodes.

    The EP rank with most rows sets the time, and all wait for it. Where both parts overlap, the second figure is what
    the first does not hide.
    """
    group, model = work.expert_group, work.model
    if group.ranks == 1:
        return 0.0, 0.0
    if work.gathers_tokens:  # every token to every rank, whatever the imbalance
        rate = work.gpu.link_rate * work.efficiency.link
        return COLLECTIVE_S + work.tokens * row_bytes * (group.ranks - 1) / rate, 0.0
    rows = work.tokens * work.imbalance
    chosen = model.num_experts_per_tok
    intra_bytes = (
        rows * chosen * row_bytes * (group.on_node - 1) / (group.on_node if work.once_per_node else group.ranks)
    )
    intra = COLLECTIVE_S + intra_bytes / (work.gpu.link_rate * work.efficiency.link)
    if group.nodes == 1:
        return intra, 0.0
    copies = work.nodes_of_a_token if work.once_per_node else float(chosen)
    achieved = work.efficiency.fused_all_to_all if work.fused_all_to_all else work.efficiency.all_to_all
    across_bytes = rows * copies * row_bytes * (group.nodes - 1) / group.nodes
    across = NETWORK_HOP_S + across_bytes / (work.gpu.network_rate * achieved)
    # To a node and then inside it are two collectives in sequence; fused kernels do both at a time.
    sequential = work.once_per_node and not work.fused_all_to_all
    return intra, across if sequential else max(0.0, across - intra)
