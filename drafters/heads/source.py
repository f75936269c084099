"""Heads that drafters get: a network as it is, or a checkpoint that is read once its target is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import nn

from specdec.checkpoint import Checkpoint, read_checkpoint
from specdec.drafters.heads.eagle import EagleHead
from specdec.drafters.heads.formats import load_head
from specdec.drafters.heads.medusa import MedusaHeads
from specdec.drafters.heads.wide import widen_eagle
from specdec.model import PagedModel
from specdec.stand_in import StandIn

HeadT = TypeVar("HeadT", bound=nn.Module)
_DRAFTERS: dict[type[nn.Module], str] = {MedusaHeads: "medusa", EagleHead: "eagle"}


class HeadSource(Generic[HeadT]):
    """A checkpoint of a head of class `kind`; what it leaves out, such as the number of layers, only the target tells.

    It is read here, so that what is missing or damaged is found before a target is loaded. `options` go to
    `formats.load_head`.
    """

    def __init__(self, path: str, kind: type[HeadT], **options: Any) -> None:
        self.path, self._kind, self._options = path, kind, options
        checkpoint = read_checkpoint(path)
        self.folder: Path = checkpoint.files[0].parent
        self._checkpoint: Checkpoint | None = checkpoint
        self._read: tuple[PagedModel, HeadT] | None = None

    def head(self, target: PagedModel) -> HeadT:
        """The head for this target. Raises ValueError where it does not fit, or is not of that class."""
        if self._read is None or self._read[0] is not target:
            # The checkpoint's tensors go with the first head; a second target is a rare thing.
            held, self._checkpoint = self._checkpoint or self.path, None
            made_for = target.small_sizes if isinstance(target, StandIn) else target
            head = load_head(held, made_for, dtype=target.dtype, device=target.device, **self._options)
            if not isinstance(head, self._kind):
                raise ValueError(
                    f"{self.path} holds {type(head).__name__}, which drafter={_DRAFTERS[self._kind]} cannot run: "
                    f"use drafter={_DRAFTERS[type(head)]}"
                )
            if isinstance(target, StandIn):
                if not isinstance(head, EagleHead):
                    raise ValueError(f"{self.path}: for a stand-in only EAGLE-3 heads can be widened")
                head = widen_eagle(head, target.small, target.shape, target.small_eps)
            assert isinstance(head, self._kind)
            self._read = target, head
        return self._read[1]


def resolve(given: HeadT | HeadSource[HeadT], target: PagedModel) -> HeadT:
    return given.head(target) if isinstance(given, HeadSource) else given
