"""The target's features on disk: computed once, read as often as training likes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from specdec.drafters.training.records import RecordSet, write_json
from specdec.drafters.training.rows import Row
from specdec.drafters.training.target import States

_SETTINGS = "cache.json"


class FeatureCache:
    """Hidden states of `layers` for every record of a data folder, in the target's own number format.

    They take `bytes_per_token` for each token. The last state is among them wherever the target's law is wanted: the law
    over any vocabulary follows from it exactly, for less space than the logits. Raises ValueError for a folder that holds
    features of other data, layers or another target.
    """

    def __init__(
        self,
        folder: str | Path,
        data: RecordSet,
        layers: Seq[int],
        hidden_size: int,
        dtype: torch.dtype,
        target_name: str,
        shard_size: int = 256,
    ) -> None:
        if data.split != "all":
            raise ValueError(f"features are kept for all records, not for split={data.split}")
        self.folder, self._data, self._layers = Path(folder), data, tuple(layers)
        self.bytes_per_token = len(self._layers) * hidden_size * dtype.itemsize
        self.num_bytes = self.bytes_per_token * sum(data.lengths)
        wanted: dict[str, Any] = {
            "data": data.fingerprint,
            "target": target_name,
            "layers": list(layers),
            "dtype": str(dtype).removeprefix("torch."),
            "shard_size": shard_size,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        place = self.folder / _SETTINGS
        if place.exists():
            found = json.loads(place.read_text(encoding="utf-8"))
            for name, value in wanted.items():
                if found.get(name) != value:
                    raise ValueError(
                        f"{self.folder} holds features of {name}={found.get(name)!r}, not {value!r}: choose another cache="
                    )
        else:
            write_json(place, wanted)
        self._shards = [list(range(i, min(i + shard_size, len(data)))) for i in range(0, len(data), shard_size)]
        self._shard_size = shard_size
        starts = torch.tensor([0, *data.lengths]).cumsum(0)
        # Where a record begins within its shard.
        self._starts = [int(starts[i] - starts[i - i % shard_size]) for i in range(len(data))]
        self._open: dict[int, Any] = {}

    def fill(
        self, states: States, row_tokens: int, on_shard: Callable[[int, int], None] = lambda done, all: None
    ) -> None:
        """Computes what is missing, shard by shard; each appears whole or not at all, so it can be stopped at any time."""
        for number, records in enumerate(self._shards):
            place = self._place(number)
            if not place.exists():
                parts: dict[int, list[Tensor]] = {layer: [] for layer in self._layers}
                for some in _runs(records, self._data.lengths, row_tokens):
                    row = Row.of([self._data[i] for i in some])
                    for layer, found in states(some, row, self._layers).items():
                        parts[layer].append(found.cpu())
                part = place.with_suffix(".part")
                save_file({str(layer): torch.cat(found) for layer, found in parts.items()}, part)
                os.replace(part, place)
            on_shard(number + 1, len(self._shards))

    def __call__(self, records: Seq[int], row: Row, layers: Seq[int]) -> dict[int, Tensor]:
        """As `TrainingTarget` gives them; `records` are places among all records of the data folder."""
        parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        for record, length in zip(records, row.lengths, strict=True):
            file, start = self._file(record // self._shard_size), self._starts[record]
            for layer, found in parts.items():
                found.append(file.get_slice(str(layer))[start : start + length])
        return {layer: torch.cat(found).to(row.device) for layer, found in parts.items()}

    def _file(self, number: int) -> Any:
        if number not in self._open:
            self._open[number] = safe_open(self._place(number), framework="pt")
        return self._open[number]

    def _place(self, number: int) -> Path:
        return self.folder / f"features-{number:05d}.safetensors"


def _runs(records: Seq[int], lengths: Seq[int], row_tokens: int) -> list[list[int]]:
    """Neighbouring records together, up to `row_tokens` tokens at a time."""
    runs: list[list[int]] = []
    room = 0
    for record in records:
        if lengths[record] > room:
            runs.append([])
            room = row_tokens
        runs[-1].append(record)
        room -= lengths[record]
    return runs
