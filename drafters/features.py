"""What an EAGLE head reads beside tokens: the target's features, kept until they are read, and for whoever shares a page."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from specdec.states import PickedStates

# A view of what several sequences have in common may keep so many times its own size alive.
_MOST_HELD = 32


class Features:
    """The target's features of positions `first`..`end`-1.

    They lie as the target gave them, piece by piece, until they are read: most texts are never read where drafting does not
    pay. `fused` [n, D] are the first of them, `raw` [.., layers * D] the others.
    """

    def __init__(self, first: int = 0, fused: Tensor | None = None, raw: Iterable[Tensor] = ()) -> None:
        self.first, self._fused, self._raw = first, fused, list(raw)
        self.end = first + (0 if fused is None else fused.shape[0]) + sum(piece.shape[0] for piece in self._raw)

    def add(self, states: Tensor) -> None:
        """States [n, layers * D] of the positions that follow; see `joined`."""
        self._raw.append(states)
        self.end += states.shape[0]

    def part(self, start: int, end: int) -> Features:
        """A copy of those of positions `start`..`end`-1, all of which must be there."""
        assert self.first <= start <= end <= self.end, f"features {start}..{end} of {self.first}..{self.end}"
        raw, at = list[Tensor](), self.end
        # Mostly the last ones are wanted.
        for piece in reversed(self._raw):
            if at <= start:
                break
            count = piece.shape[0]
            at -= count
            if at < end:
                whole = start <= at and at + count <= end
                raw.append(piece if whole else piece[max(start - at, 0) : min(end - at, count)])
        fused = None
        if self._fused is not None and start < at:
            fused = self._fused[start - self.first : end - self.first].clone()
        return Features(start, fused, [torch.cat(raw[::-1])] if raw else [])

    def drop(self, end: int) -> None:
        """Lets go of those before position `end`."""
        kept = self.part(end, self.end)
        self.first, self._fused, self._raw = kept.first, kept._fused, kept._raw

    def fused(self, start: int, end: int) -> Tensor:
        """Features [end - start, D] of positions `start`..`end`-1, all fused."""
        assert self._fused is not None and not self._raw, "features are fused before they are read"
        return self._fused[start - self.first : end - self.first]

    def take(self, start: int, end: int) -> Tensor:
        """The same; those before the last of them are not asked for again."""
        taken = self.fused(start, end)
        self._fused, self.first = self.fused(end - 1, self.end), end - 1
        return taken

    @staticmethod
    def fuse(each: Seq[Features], fuse: Callable[[Tensor], Tensor]) -> None:
        """Turns all that is raw of these into features, at once."""
        raw = [piece for one in each for piece in one._raw]
        if not raw:
            return
        fused, at = fuse(torch.cat(raw)), 0
        for one in each:
            count = sum(piece.shape[0] for piece in one._raw)
            new = fused[at : at + count]
            one._fused, one._raw = (new if one._fused is None else torch.cat([one._fused, new])), []
            at += count


@dataclass(eq=False)
class PageNote:
    """What goes with a full page that requests share, so that whoever adopts it need not compute it again.

    Of the head's entries that lie on the page, those before `start` have been read, `end` follows the last: the first on the
    next page, whose feature is that of this page's last position. `features` are of positions `start`..`end`. It is among
    `unread` while there are such entries.
    """

    start: int
    end: int
    features: Features
    unread: weakref.WeakSet[PageNote]

    def __post_init__(self) -> None:
        if not self.is_read:
            self.unread.add(self)

    @property
    def is_read(self) -> bool:
        return self.start >= self.end

    def read_to(self, entry: int) -> None:
        """Whoever has the page has read the entries before this one."""
        start = min(entry, self.end)
        if start > self.start:
            self.features.drop(start)
            self.start = start
            if self.is_read:
                self.unread.discard(self)


def joined(each: Seq[Mapping[int, Tensor]], layers: Seq[int]) -> list[Tensor]:
    """The states of a step [n, layers * D] as they are kept: apart from it, so that what waits to be read does not hold on to
    the prompts of others."""
    if all(isinstance(one, PickedStates) for one in each):
        return PickedStates.joined(cast("Seq[PickedStates]", each), layers, _MOST_HELD)
    return [torch.cat([one[layer] for layer in layers], 1) for one in each]
