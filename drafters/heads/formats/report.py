"""What a checkpoint of a learned head is, which target it fits, and what is wrong with it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from specdec.checkpoint import DamagedCheckpointError, read_checkpoint
from specdec.drafters.heads.formats.description import HeadConfig, Options, Target
from specdec.drafters.heads.formats.files import describe


@dataclass(frozen=True)
class HeadReport:
    """A checkpoint at a glance; `config` None where it contradicts itself or cannot be read.

    `unknown` names fields of `config` that hold placeholders, since only the target tells them.
    """

    path: str
    format: str
    drafter: str
    config: HeadConfig | None
    files: tuple[str, ...] = ()
    num_parameters: int = 0
    num_bytes: int = 0
    dtypes: tuple[str, ...] = ()
    base_model: str | None = None
    unknown: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def is_sound(self) -> bool:
        return not self.problems


def inspect_head(
    path: str | os.PathLike[str],
    target: Target | None = None,
    *,
    layer_ids: str | None = None,
    norm_before_residual: bool | None = None,
) -> HeadReport:
    """Everything that `load_head` would find out or complain about, without building the head.

    Damaged files are a problem of the report. Raises FileNotFoundError where there is nothing and ValueError where no
    head is meant: a folder without weights, or weights of something else.
    """
    try:
        checkpoint = read_checkpoint(path)
    except DamagedCheckpointError as error:
        return HeadReport(os.fspath(path), "unreadable", "unknown", None, problems=(str(error),))
    found = describe(checkpoint, Options(target, layer_ids, norm_before_residual))
    weights = [tensor for tensor in checkpoint.tensors.values() if tensor.dtype.is_floating_point]
    return HeadReport(
        path=os.fspath(path),
        format=found.format,
        drafter=found.drafter,
        config=found.config,
        files=tuple(file.name for file in checkpoint.files),
        num_parameters=sum(tensor.numel() for tensor in weights),
        num_bytes=sum(file.stat().st_size for file in checkpoint.files),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights})),
        base_model=found.base_model,
        unknown=tuple(found.findings.unknown),
        notes=tuple(found.findings.notes),
        problems=tuple(found.findings.problems),
    )
