"""Lay out the prompts of K clients as sequences for the text tower, with the slots at which each is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """P prompts for each of K clients, in N = K * G sequences of M slots, client-major.

    `slots` `(N, M)` says which row of the flattened stem output each slot starts from (None: one client, all rows in
    order), `positions` `(N, M)` which position of the prompt it has. `mask`, added to the attention's logits, is
    `(N, 1, M, M)`, `(1, 1, M, M)` or None. `reads` `(N, R)` are the slots that are read of each sequence, and `ends`
    `(K * P,)` says where among the flattened `(N * R,)` of them each prompt is.
    """

    num_clients: int
    slots: Tensor | None
    positions: Tensor
    mask: Tensor | None
    reads: Tensor
    ends: Tensor

    def to(self, device: torch.device) -> Layout:
        """Return this layout with its tensors on `device`."""
        tensors = (self.slots, self.positions, self.mask, self.reads, self.ends)
        return Layout(self.num_clients, *(None if each is None else each.to(device) for each in tensors))  # type: ignore[arg-type]

    def first(self, num_clients: int) -> Layout:
        """The layout of the first `num_clients` clients alone, without a copy."""
        num_sequences = len(self.positions) * num_clients // self.num_clients
        ends = self.ends[: len(self.ends) * num_clients // self.num_clients]
        return replace(self.sequences(0, num_sequences), num_clients=num_clients, ends=ends)

    def sequences(self, start: int, stop: int) -> Layout:
        """The sequences from `start` to `stop`, without a copy; `ends` stays as it is."""
        return replace(
            self,
            slots=None if self.slots is None else self.slots[start:stop],
            positions=self.positions[start:stop],
            mask=self.mask if self.mask is None or len(self.mask) == 1 else self.mask[start:stop],
            reads=self.reads[start:stop],
        )


@dataclass(frozen=True, eq=False)
class Prompts:
    """The tokenised prompts of all classes, class-major: T templates of class 0, then those of class 1; on the CPU.

    `tokens` and `positions` are int64 `(G, M)`. `hidden` `(G or 1, M, M)` is True where a slot (row) must not see
    another (column); None hides nothing. `ends` `(C * T,)` is the slot in the flattened `(G * M,)` at which each prompt
    is read. `parents` `(G * M,)` is the slot of the token before, or -1; None means that each prompt has a sequence of
    its own. `num_of_class` `(C,)` says how many prompts each class has where not all have T: its first one stands
    in the places that it doesn't fill. None: all have T. `learned` `(G, M)` says which learned vector stands in a slot,
    -1 where a word's does; None: nowhere.
    """

    tokens: Tensor
    positions: Tensor
    hidden: Tensor | None
    ends: Tensor
    parents: Tensor | None
    num_classes: int
    num_of_class: Tensor | None = None
    learned: Tensor | None = None

    @property
    def num_places(self) -> int:
        """T, the places for prompts that each class has."""
        return len(self.ends) // self.num_classes

    @cached_property
    def layout(self) -> Layout:
        """All prompts, for one client."""
        return self._layout(1, None, self.positions, self.hidden, self._are_ends(self.ends.unsqueeze(0)), self.ends)

    def for_clients(self, number: int) -> Layout:
        """All prompts, for each of `number` clients."""
        if number == 1:
            return self.layout
        num_groups, num_slots = self.tokens.shape
        one, offsets = self.layout, torch.arange(number).unsqueeze(1) * (num_groups * self.layout.reads.shape[1])
        shared_mask = one.mask is None or len(one.mask) == 1
        return Layout(
            num_clients=number,
            slots=torch.arange(num_groups * num_slots).view(num_groups, num_slots).repeat(number, 1),
            positions=one.positions.repeat(number, 1),
            mask=one.mask if shared_mask else one.mask.repeat(number, 1, 1, 1),  # type: ignore[union-attr]
            reads=one.reads.repeat(number, 1),
            ends=(one.ends + offsets).flatten(),
        )

    def of_classes(self, classes: Tensor) -> Layout:
        """Only the prompts of `classes` `(K, C)` int64, client k's own, each one's in that order.

        What a client's prompts don't need is left out; sequences are as long as the one that needs most.
        """
        places = torch.arange(self.num_places)
        return self.chosen((classes.unsqueeze(-1) * len(places) + places).flatten(1))

    def of_places(self, places: Tensor) -> Layout:
        """Only one prompt of each class: that in the class's place `places` `(K, C)` int64, client k's own."""
        return self.chosen(torch.arange(self.num_classes) * self.num_places + places)

    def chosen(self, prompts: Tensor) -> Layout:
        """Only the prompts `(K, P)` int64, client k's own, in that order; what they don't need is left out."""
        number, (num_groups, num_slots) = len(prompts), self.tokens.shape
        ends = self.ends[prompts]
        if self.parents is None:
            rows = ends.flatten() // num_slots
            slots = rows.unsqueeze(1) * num_slots + torch.arange(num_slots)
            is_end = torch.zeros(slots.shape, dtype=torch.bool)
            is_end[torch.arange(len(slots)), ends.flatten() % num_slots] = True
            hidden = self.hidden if self.hidden is None or len(self.hidden) == 1 else self.hidden[rows]
            kept_ends = torch.arange(len(slots)) * num_slots + ends.flatten() % num_slots
            return self._layout(number, slots, self.positions[rows], hidden, is_end, kept_ends)
        needed = self._ancestors(ends).view(number * num_groups, num_slots)
        kept, rank = _compact(needed)
        groups = torch.arange(num_groups).repeat(number).unsqueeze(1)
        slots = groups * num_slots + kept
        assert self.hidden is not None
        hidden = self.hidden[groups.unsqueeze(2), kept.unsqueeze(2), kept.unsqueeze(1)]
        positions = self.positions[groups, kept]
        is_end = self._are_ends(ends).gather(1, kept)
        rows = torch.arange(number).unsqueeze(1) * num_groups + ends // num_slots
        kept_ends = rows * kept.shape[1] + rank[rows, ends % num_slots]
        return self._layout(number, slots, positions, hidden, is_end, kept_ends.flatten())

    def _ancestors(self, ends: Tensor) -> Tensor:
        """The slots `(K, G * M)` that the slots `ends` `(K, P)` can see."""
        assert self.parents is not None
        needed = torch.zeros(len(ends), self.tokens.numel(), dtype=torch.bool)
        rows = torch.arange(len(ends)).unsqueeze(1).expand_as(ends).flatten()
        slots = ends.flatten()
        while len(slots):
            needed[rows, slots] = True
            slots = self.parents[slots]
            rows, slots = rows[slots >= 0], slots[slots >= 0]
        return needed

    def _are_ends(self, ends: Tensor) -> Tensor:
        """`(K * G, M)`: True at the slots `ends` `(K, P)`."""
        is_end = torch.zeros(len(ends), self.tokens.numel(), dtype=torch.bool).scatter_(1, ends, True)
        return is_end.view(-1, self.tokens.shape[1])

    @staticmethod
    def _layout(
        number: int, slots: Tensor | None, positions: Tensor, hidden: Tensor | None, is_end: Tensor, ends: Tensor
    ) -> Layout:
        """`is_end` `(N, M)` marks the slots that are read; `ends` are slots in the flattened `(N * M,)`."""
        reads, rank = _compact(is_end)
        row, slot = ends // is_end.shape[1], ends % is_end.shape[1]
        mask = None
        if hidden is not None:
            mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf).unsqueeze(1)
        return Layout(number, slots, positions, mask, reads, row * reads.shape[1] + rank[row, slot])


def _compact(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of `chosen` `(N, M)`: the columns that are True, in order, and the place of each among them.

    Rows with fewer than the most are filled up with other columns.
    """
    most = max(int(chosen.sum(dim=1).max()), 1)
    return (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :most], chosen.cumsum(dim=1) - 1
