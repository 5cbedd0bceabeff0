"""Seconds of collectives by alpha-beta: the bytes of a ring over the bandwidth of the slowest link, and a latency per
ring step. Pure; no torch.
"""

from typing import Literal, NamedTuple

from megachat.planning.hardware import Machine

BASE_SEC = 8.4e-6  # of every collective: ring, protocol Simple in NCCL's src/graph/tuning.cc (commit 01afd20)
LINK_SHARE = 0.8  # of the data sheet's bandwidth that collectives of many megabytes reach; assumed
Kind = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "send"]


class RankGroup(NamedTuple):
    """The ranks of a collective: how many, and on how many nodes."""

    ranks: int
    nodes: int = 1


def axis_group(machine: Machine, size: int, stride: int, first: int = 0) -> RankGroup:
    """Returns the group of an axis of `size` ranks whose neighbors are `stride` world ranks apart.

    World ranks fill a node before the next one. first: the first world rank of a pair of pipeline stages; the pair is
    over two nodes if any of its ranks sends to another node.
    """
    if size == 2 and first // machine.gpus_per_node < (first + 2 * stride - 1) // machine.gpus_per_node:
        return RankGroup(2, 2)
    per_node = max(1, min(size, machine.gpus_per_node // stride))
    return RankGroup(size, -(-size // per_node))


def sent_bytes(kind: Kind, size: float, ranks: int) -> float:
    """Returns the bytes that each rank sends in a ring. size: of the whole tensor, for "send" of what is sent."""
    if ranks == 1:
        return 0.0
    return size if kind == "send" else size * (ranks - 1) / ranks * (2 if kind == "all_reduce" else 1)


def collective_sec(machine: Machine, kind: Kind, size: float, group: RankGroup) -> float:
    """Returns the seconds of a collective of `size` bytes (of the whole tensor) over the group; 0 for one rank.

    Over several nodes, tensors are reduced or gathered in two levels: inside the node first, so that each rank sends
    its part of the node's share through the network. An all-to-all sends (nodes - 1) / nodes of its bytes through it.
    """
    ranks, nodes = group
    if ranks == 1:
        return 0.0
    link, network = machine.gpu.link, machine.network
    sent = sent_bytes(kind, size, ranks)
    times = 2 if kind == "all_reduce" else 1
    steps = 1 if kind in ("send", "all_to_all") else times * (ranks - nodes)
    seconds = BASE_SEC + steps * link.latency_sec
    inside = sent / (LINK_SHARE * link.bytes_per_sec)
    if nodes == 1:
        return seconds + inside
    seconds += (1 if kind in ("send", "all_to_all") else times * (nodes - 1)) * network.latency_sec
    if kind == "send":
        across = sent
    elif kind == "all_to_all":
        across = size * (nodes - 1) / nodes
    else:
        across = times * size * (nodes - 1) / nodes / max(1, ranks // nodes)
    return seconds + max(inside, across / (LINK_SHARE * network.bytes_per_sec))
