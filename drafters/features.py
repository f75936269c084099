"""What an EAGLE head reads beside tokens: the target's features, kept until they are read, and for whoever shares a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec.states import PickedStates

# A view of a step's states may keep so many times its own size alive.
_MOST_HELD = 32


@dataclass(frozen=True, slots=True)
class _Piece:
    """Features of `count` positions: fused, or states of the target by layer, as they came."""

    count: int
    states: Tensor | Mapping[int, Tensor]

    def part(self, start: int, end: int) -> _Piece:
        """A copy of those from `start` to `end` - 1, which keeps nothing else alive."""
        if isinstance(self.states, Tensor):
            return _Piece(end - start, self.states[start:end].clone())
        if isinstance(self.states, PickedStates):
            rows = self.states.rows
            rows = slice(rows.start + start, rows.start + end) if isinstance(rows, slice) else rows[start:end]
            picked = replace(self.states, rows=rows)
            return _Piece(end - start, {layer: picked[layer].clone() for layer in picked})
        return _Piece(end - start, {layer: states[start:end].clone() for layer, states in self.states.items()})


class Features:
    """The target's features of positions `first`..`end`-1.

    They lie as the target gave them, piece by piece, until they are read: most texts are never read where drafting does not
    pay.
    """

    def __init__(self, first: int = 0, pieces: Iterable[_Piece] = ()) -> None:
        self.first, self._pieces = first, list(pieces)
        self.end = first + sum(piece.count for piece in self._pieces)

    def add(self, count: int, hidden: Mapping[int, Tensor]) -> None:
        """States of the `count` positions that follow, by layer."""
        self._pieces.append(_Piece(count, _apart(hidden)))
        self.end += count

    def part(self, start: int, end: int) -> Features:
        """A copy of those of positions `start`..`end`-1, all of which must be there."""
        assert self.first <= start <= end <= self.end, f"features {start}..{end} of {self.first}..{self.end}"
        found, at = list[_Piece](), self.first
        for piece in self._pieces:
            inside = max(start - at, 0), min(end - at, piece.count)
            if inside[0] < inside[1]:
                found.append(piece.part(*inside))
            at += piece.count
        return Features(start, found)

    def drop(self, end: int) -> None:
        """Lets go of those before position `end`."""
        kept = self.part(end, self.end)
        self.first, self._pieces = kept.first, kept._pieces

    def take(self, start: int, end: int) -> Tensor:
        """Features [end - start, D] of positions `start`..`end`-1, all fused; those before the last of them are not asked for
        again."""
        fused = torch.cat([piece.states for piece in self._pieces if isinstance(piece.states, Tensor)])
        assert len(fused) == self.end - self.first, "features are fused before they are taken"
        taken = fused[start - self.first : end - self.first]
        self._pieces = [_Piece(self.end - end + 1, fused[end - 1 - self.first :])]
        self.first = end - 1
        return taken

    @staticmethod
    def unfused(each: Seq[Features]) -> list[Mapping[int, Tensor]]:
        """The states that have not been fused, in their order, of all of these."""
        return [piece.states for one in each for piece in one._pieces if not isinstance(piece.states, Tensor)]

    @staticmethod
    def put_fused(each: Seq[Features], fused_TD: Tensor) -> None:
        """In the place of what `unfused` gave, in the same order."""
        at = 0
        for one in each:
            old = [piece for piece in one._pieces if isinstance(piece.states, Tensor)]
            count = one.end - one.first - sum(piece.count for piece in old)
            if count:
                # What was fused came before what was not.
                one._pieces = [*old, _Piece(count, fused_TD[at : at + count])]
                at += count
        assert at == len(fused_TD)


@dataclass(eq=False)
class PageNote:
    """What goes with a full page that requests share, so that whoever adopts it need not compute it again.

    Of the head's entries that lie on the page, those before `start` have been read, `end` follows the last: the first on the
    next page, whose feature is that of this page's last position. `features` are of positions `start`..`end`.
    """

    start: int
    end: int
    features: Features

    @property
    def is_read(self) -> bool:
        return self.start >= self.end

    def read_to(self, entry: int) -> None:
        """Whoever has the page has read the entries before this one."""
        start = min(entry, self.end)
        if start > self.start:
            self.features.drop(start)
            self.start = start


def _apart(hidden: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
    """The states as they are kept: views of a whole step's as long as most of that is wanted, else copies, so that one that
    waits to be read does not hold on to the prompts of others."""
    if isinstance(hidden, PickedStates):
        return hidden.apart(_MOST_HELD)
    if any(states.untyped_storage().nbytes() > _MOST_HELD * states.nbytes for states in hidden.values()):
        return {layer: states.clone() for layer, states in hidden.items()}
    return hidden
