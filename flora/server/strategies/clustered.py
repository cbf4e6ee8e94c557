"""Strategies that keep several models at the server, one for each cluster of clients."""

from __future__ import annotations

from dataclasses import dataclass

from flora.core.clusters import in_cluster, is_of_first
from flora.core.registry import option, register
from flora.core.tree import State
from flora.server.strategies.base import Strategy


@register("ifca")
@dataclass(frozen=True)
class Ifca(Strategy):
    """Several models, of which each client trains the one that fits its examples best (IFCA, arXiv:2006.04088).

    Algorithm 1 with model averaging: in each round every client of the cohort gets all models, takes the one with the
    lowest mean cross-entropy on its training examples (the first of equal ones), trains it, and sends it with its
    cluster's number; the mean is taken in each cluster, and a cluster that nobody took stays as it is. A client's model
    is its cluster's. Whose examples fit which model is found anew each time, so nothing is kept at the clients.
    Differs from the paper: clients weigh as `weighting` says, and all models begin as one, because adapters begin as
    the frozen model: so in the first `random_rounds` rounds the cohort is dealt out among the clusters by chance, as
    the authors' code begins on FEMNIST (there each client stays in its part for all of these).
    """

    clusters: int = option("how many models the server keeps", 2, at_least=2, at_most=1000)
    random_rounds: int = option("rounds at the start in which clients take a cluster by chance", 1, at_least=1)

    @property
    def num_clusters(self) -> int:
        return self.clusters

    def is_random(self, round: int) -> bool:
        return round <= self.random_rounds

    def trains(self, name: str, round: int) -> bool:
        return is_of_first(name)

    def initial(self, adapter: State) -> State:
        whole: State = {}
        for cluster in range(self.clusters):  # copies, because safetensors refuses tensors that share memory
            whole |= in_cluster({name: tensor.clone() for name, tensor in adapter.items()}, cluster)
        return whole
