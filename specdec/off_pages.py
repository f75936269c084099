"""Drafters that keep nothing on the pages: the base of ours, and what is said for those of one's own."""

from __future__ import annotations

import sys
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any, cast

from specdec.interfaces import Commit, Drafter, Noise, PagedDrafter, TreePolicy

if TYPE_CHECKING:
    from specdec.model import PagedModel
    from specdec.pages import PagePool
    from specdec.sequence import Sequence
    from specdec.tree import TokenTree

_VERBS = ("feature_layers", "observe", "propose", "forget")
_SHARING = ("covers_unasked", "covered", "note", "adopt", "num_unread")


class OffPages:
    """Base of the drafters that keep nothing on the pages and can do without having observed a prefix."""

    covers_unasked = True

    def covered(self, sequence_id: int) -> int:
        return sys.maxsize

    def note(self, sequence_id: int, end: int) -> None:
        pass

    def adopt(self, sequence: Sequence, num_positions: int, notes: Seq[object]) -> None:
        pass

    def num_unread(self, sequence: Sequence) -> int:
        return 1


class _Verbs(OffPages):
    """Speaks for a drafter that has its verbs alone. It observes the tokens of a shared prefix as it would those of a prompt;
    where it wants features too, which nobody has kept, nothing is shared. Trees without draws may be on the CPU, wherever the
    target is."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._drafter, name)

    @property
    def covers_unasked(self) -> bool:  # type: ignore[override]
        return not self._drafter.feature_layers

    def bind(self, target: PagedModel, pool: PagePool) -> None:
        self._device = target.device
        bind = getattr(self._drafter, "bind", None)
        if bind is not None:
            bind(target, pool)

    def propose(self, sequences: Seq[Sequence], policy: TreePolicy, noise: Noise) -> TokenTree:
        tree = self._drafter.propose(sequences, policy, noise)
        return tree if tree.device.type == self._device.type else tree.to(self._device)

    def covered(self, sequence_id: int) -> int:
        return 0 if self._drafter.feature_layers else sys.maxsize

    def adopt(self, sequence: Sequence, num_positions: int, notes: Seq[object]) -> None:
        tokens = sequence.token_ids
        prefix = Commit(sequence.id, 0, tokens[:num_positions], tokens[num_positions], None, {}, sequence)
        self._drafter.observe([prefix])


def completed(drafter: Drafter) -> PagedDrafter:
    """The drafter with all that an engine asks for. For one that has its verbs alone (and `bind` perhaps) what is asked about
    pages is answered here. Raises ValueError where a verb is missing, or a part of what there is to answer about pages."""
    if isinstance(drafter, PagedDrafter):
        return drafter
    name = type(drafter).__name__
    missing = [verb for verb in _VERBS if not hasattr(drafter, verb)]
    if missing:
        raise ValueError(f"drafter {name} lacks {', '.join(missing)}: every drafter has {', '.join(_VERBS)}")
    missing = [one for one in ("bind", *_SHARING) if not hasattr(drafter, one)]
    if any(hasattr(drafter, one) for one in _SHARING):
        raise ValueError(
            f"drafter {name} answers a part of what is asked about pages and lacks {', '.join(missing)}: give all of "
            f"{', '.join(_SHARING)} and bind, or none of them if it keeps nothing on the pages"
        )
    return cast("PagedDrafter", _Verbs(drafter))
