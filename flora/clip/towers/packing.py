"""Prompts packed as prefix trees: a token that several prompts begin with is computed once.

In a causal tower a token's output depends on the tokens before it alone. So prompts that begin alike share those
outputs, and a prompt that is read at its end-of-text token needs nothing behind that. A group of prompts is laid out
as one sequence, the nodes of its prefix tree, with an attention mask that lets each node see its ancestors and itself.
The numbers are those of the prompts one by one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Group sizes that are aimed at: small ones repeat shared prefixes, large ones make attention costly.
GROUP_SIZES = (32, 48, 64, 96, 128, 192, 256)
# Past this many sequences the last group's empty slots no longer matter, and one size is as good as another.
MANY_SEQUENCES, MANY_LIMIT = 1000, 64
# Attention's multiplications take about this many times as long as those of the large matrix products (measured on
# two CPU cores at width 512).
ATTENTION_COST = 3


@dataclass(frozen=True, eq=False)
class Packing:
    """P sequences in G groups of M slots.

    `tokens` and `positions` are int64 `(G, M)`; `visible` `(G, M, M)` is True where a slot (row) sees another (column);
    `parents` `(G, M)` is the slot of the token before, in the flattened `(G * M,)`, or -1; `ends` `(P,)` is the slot in
    the same order that holds the last token of each sequence. Unused slots see themselves.
    """

    tokens: np.ndarray
    positions: np.ndarray
    visible: np.ndarray
    parents: np.ndarray
    ends: np.ndarray


def pack(sequences: Sequence[Sequence[int]], width: int) -> Packing:
    """Lay the sequences out with the group size that costs least in a tower of `width`."""
    if len(sequences) >= MANY_SEQUENCES:
        return _lay_out(_group(sequences, MANY_LIMIT), len(sequences))
    num_nodes = len(_group(sequences, sum(map(len, sequences)))[0])
    layouts = [_even_groups(sequences, number) for number in {1, *(-(-num_nodes // size) for size in GROUP_SIZES)}]
    return _lay_out(min(layouts, key=lambda groups: _cost(groups, width)), len(sequences))


def one_by_one(sequences: Sequence[Sequence[int]]) -> Packing:
    """Each sequence in a group of its own: nothing is shared, shorter ones are padded."""
    groups = []
    for index, sequence in enumerate(sequences):
        tree = _Tree()
        tree.add(index, sequence)
        groups.append(tree)
    return _lay_out(groups, len(sequences))


class _Tree:
    """A prefix tree under construction: nodes in the order in which they came, each behind its parent."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.ends: dict[int, int] = {}
        self._children: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def num_new(self, sequence: Sequence[int]) -> int:
        """Return how many nodes `sequence` would add."""
        node = -1
        for depth, token in enumerate(sequence):
            if (node, token) not in self._children:
                return len(sequence) - depth
            node = self._children[node, token]
        return 0

    def add(self, index: int, sequence: Sequence[int]) -> None:
        node = -1
        for token in sequence:
            if (node, token) not in self._children:
                self._children[node, token] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(node)
            node = self._children[node, token]
        self.ends[index] = node


def _group(sequences: Sequence[Sequence[int]], limit: int) -> list[_Tree]:
    """Neighbours in alphabetical order together, at most `limit` nodes a group (more if one sequence is longer)."""
    groups = [_Tree()]
    for index in sorted(range(len(sequences)), key=lambda index: tuple(sequences[index])):
        if groups[-1].ends and len(groups[-1]) + groups[-1].num_new(sequences[index]) > limit:
            groups.append(_Tree())
        groups[-1].add(index, sequences[index])
    return groups


def _even_groups(sequences: Sequence[Sequence[int]], number: int) -> list[_Tree]:
    """At most `number` groups, with the lowest limit that allows it: every group has as many slots as the largest."""
    limits = range(1, sum(map(len, sequences)) + 1)
    first = bisect_left(limits, True, key=lambda limit: len(_group(sequences, limit)) <= number)
    return _group(sequences, limits[first])


def _cost(groups: Sequence[_Tree], width: int) -> float:
    """Multiplications of a block up to a factor: 12 width^2 a slot in matrices, 2 width a pair of slots."""
    size = max(map(len, groups))
    return len(groups) * size * (12 * width + 2 * ATTENTION_COST * size)


def _lay_out(groups: Sequence[_Tree], num_sequences: int) -> Packing:
    size = max(map(len, groups))
    tokens = np.zeros((len(groups), size), dtype=np.int64)
    positions = np.zeros_like(tokens)
    visible = np.tile(np.eye(size, dtype=bool), (len(groups), 1, 1))
    parents = np.full_like(tokens, -1)
    ends = np.empty(num_sequences, dtype=np.int64)
    for number, tree in enumerate(groups):
        tokens[number, : len(tree)] = tree.tokens
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                positions[number, node] = positions[number, parent] + 1
                visible[number, node] |= visible[number, parent]
                parents[number, node] = number * size + parent
        for index, node in tree.ends.items():
            ends[index] = number * size + node
    return Packing(tokens, positions, visible, parents, ends)
