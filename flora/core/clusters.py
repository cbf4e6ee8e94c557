"""Adapters of several clusters in one state dict: the first by its names, each other by `cluster.NUMBER.NAME`."""

from __future__ import annotations

from flora.core.tree import State, StateLike, strip_prefix

_PREFIX = "cluster."


def is_of_first(name: str) -> bool:
    """Whether a tensor is the first cluster's, as all are where there is but one."""
    return not name.startswith(_PREFIX)


def in_cluster(state: StateLike, cluster: int) -> State:
    """An adapter, or a delta, under the names that it has as a cluster's, which are counted from 0."""
    return {f"{_PREFIX}{cluster}.{name}" if cluster else name: tensor for name, tensor in state.items()}


def clusters_of(state: StateLike) -> list[State]:
    """The adapters of all clusters, each under the names that clients train; one where there are no clusters."""
    first = {name: tensor for name, tensor in state.items() if is_of_first(name)}
    number = 1 + (len(state) - len(first)) // max(len(first), 1)
    return [first, *(strip_prefix(f"{_PREFIX}{cluster}.", state) for cluster in range(1, number))]
