"""How often each token comes up in training data: kept beside a head, so that it can draft the most frequent ones alone."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec.drafters.training.records import MANIFEST, RecordSet
from specdec.drafters.training.vocabulary import most_frequent, token_counts

FILE = "token_frequencies.safetensors"
_COUNTS = "counts_V"


def save_frequencies(counts_V: Tensor, folder: str | os.PathLike[str]) -> Path:
    """Writes counts, int64, into the folder of a head; returns the file, which appears whole or not at all."""
    path = Path(folder) / FILE
    part = path.with_name(f".{FILE}.tmp")
    save_file({_COUNTS: counts_V.long().contiguous()}, part)
    os.replace(part, path)
    return path


class FrequentTokens:
    """The `size` most frequent tokens of a target's vocabulary (Zhao et al. 2025, "FR-Spec", section 3.2).

    `path` is a file that `save_frequencies` has written, or a folder of training data, which is counted. Raises ValueError
    for a size below 1, and for a path that is neither.
    """

    def __init__(self, path: str | os.PathLike[str], size: int) -> None:
        if size < 1:
            raise ValueError(f"draft_vocab_size={size} must be >= 1")
        self.path, self.size, place = os.fspath(path), size, Path(path).expanduser()
        self._data = RecordSet(place) if (place / MANIFEST).is_file() else None
        self._counts_V = None if self._data is not None else _read(place)

    def ids(self, vocab_size: int) -> Tensor:
        """Their ids [R], ascending. Raises ValueError where other than `vocab_size` tokens were counted, or are fewer."""
        if self._data is not None:
            return most_frequent(token_counts(self._data, vocab_size), self.size)
        assert self._counts_V is not None
        return most_frequent(_checked(self._counts_V, self.path, vocab_size), self.size)


def frequent_tokens(
    head_folder: Path, draft_vocab_size: int | None, token_frequencies: str | None
) -> FrequentTokens | None:
    """What a drafter's options ask for: counts from `token_frequencies`, or else from the head's own folder."""
    if draft_vocab_size is None:
        if token_frequencies is not None:
            raise ValueError(f"token_frequencies={token_frequencies} is of no use without draft_vocab_size=N")
        return None
    if token_frequencies is None and not (head_folder / FILE).is_file():
        raise ValueError(
            f"draft_vocab_size={draft_vocab_size} needs to know which tokens are frequent, and {head_folder} has no {FILE}: "
            f"name such a file, or a folder of `specdec data`, as drafter.token_frequencies="
        )
    return FrequentTokens(token_frequencies or head_folder / FILE, draft_vocab_size)


def read_frequencies(file: str | os.PathLike[str], vocab_size: int) -> Tensor:
    """The counts [V] in a file of `save_frequencies`. Raises ValueError where it is none, or is of another target."""
    return _checked(_read(Path(file)), os.fspath(file), vocab_size)


def _checked(counts_V: Tensor, name: str, vocab_size: int) -> Tensor:
    if len(counts_V) != vocab_size:
        raise ValueError(
            f"{name} counts {len(counts_V)} tokens, and the target has {vocab_size}: use one that was made with this target"
        )
    return counts_V


def _read(file: Path) -> Tensor:
    try:
        counts_V = load_file(file)[_COUNTS]
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(
            f"token_frequencies={file} is neither a {FILE} nor a folder of `specdec data` ({type(error).__name__})"
        ) from error
    if counts_V.ndim != 1 or counts_V.dtype != torch.int64:
        raise ValueError(f"{file} holds counts {[*counts_V.shape]} of {counts_V.dtype}, not one integer per token")
    return counts_V
