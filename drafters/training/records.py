"""Training data on disk: records in shards, and the manifest that says what they are."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "manifest.json"
SPLITS = ("train", "held_out", "all")
# The share of held-out records is counted in this many parts.
_PARTS = 10_000


@dataclass(frozen=True)
class Record:
    """One text: `token_ids_T`, and `loss_mask_T` true where a token is one that a head should learn to predict.

    `source_hash` (63 bits) stands for what it was made from, a prompt or a document, and decides whether it is held out.
    """

    token_ids_T: Tensor
    loss_mask_T: Tensor
    source_hash: int

    @property
    def key(self) -> bytes:
        """Stands for the token ids."""
        return hashlib.sha256(self.token_ids_T.to(torch.int32).numpy().tobytes()).digest()[:8]


class RecordWriter:
    """Writes records into `folder`, shard by shard; on a folder begun before it goes on behind the last finished batch.

    `settings` say how the records are made; a folder made with others is refused with ValueError. The manifest is replaced
    in one step after each shard, so whoever dies leaves a folder that is whole. Duplicates (token for token) are dropped.
    """

    def __init__(
        self, folder: str | Path, settings: Mapping[str, Any], provenance: Mapping[str, Any], shard_size: int = 256
    ) -> None:
        if shard_size < 1:
            raise ValueError(f"shard_size={shard_size} must be >= 1")
        self.folder, self.shard_size = Path(folder), shard_size
        settings = json.loads(json.dumps(dict(settings)))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sources: set[int] = set()
        self._keys: set[bytes] = set()
        self._pending: list[Record] = []
        self._manifest: dict[str, Any] = {"settings": settings, "runs": [], "cursor": 0, "counts": {}, "shards": []}
        if (self.folder / MANIFEST).exists():
            self._manifest = read_manifest(self.folder)
            _check_settings(self.folder, self._manifest["settings"], settings)
            for record in RecordSet(self.folder, "all"):
                self._remember(record)
        self.num_resumed = self.num_records
        self._manifest["runs"].append(dict(provenance))

    @property
    def cursor(self) -> int:
        """Batches of the source that have been dealt with."""
        return self._manifest["cursor"]

    @property
    def counts(self) -> dict[str, int]:
        return self._manifest["counts"]

    @property
    def num_records(self) -> int:
        return len(self._keys)

    def has_source(self, source_hash: int) -> bool:
        return source_hash in self._sources

    def commit(self, records: Seq[Record], dropped: Mapping[str, int]) -> int:
        """Takes all records of one batch and how many texts of it were dropped for what reason; returns the records kept."""
        kept = 0
        for record in records:
            if record.key not in self._keys:
                self._remember(record)
                self._pending.append(record)
                kept += 1
        for reason, count in {"records": kept, **dropped, "duplicate_records": len(records) - kept}.items():
            if count:
                self.counts[reason] = self.counts.get(reason, 0) + count
        self._manifest["cursor"] += 1
        if len(self._pending) >= self.shard_size:
            self.flush()
        return kept

    def flush(self) -> None:
        """Puts everything committed on disk."""
        if self._pending:
            name = f"shard-{len(self._manifest['shards']):05d}.safetensors"
            tensors = {
                "token_ids_T": torch.cat([one.token_ids_T for one in self._pending]).to(torch.int32),
                "loss_mask_T": torch.cat([one.loss_mask_T for one in self._pending]).to(torch.bool),
                "lengths_R": torch.tensor([len(one.token_ids_T) for one in self._pending]),
                "source_hashes_R": torch.tensor([one.source_hash for one in self._pending]),
            }
            save_file(tensors, self.folder / name)
            shard = {
                "file": name,
                "num_records": len(self._pending),
                "num_tokens": len(tensors["token_ids_T"]),
                "num_loss_tokens": int(tensors["loss_mask_T"].sum()),
                "sha256": file_hash(self.folder / name),
            }
            self._manifest["shards"].append(shard)
            self._pending = []
        write_json(self.folder / MANIFEST, self._manifest)

    def _remember(self, record: Record) -> None:
        self._sources.add(record.source_hash)
        self._keys.add(record.key)


class RecordSet:
    """The records of one or several folders: those of the split `train`, those `held_out`, or `all`.

    Which is which follows from the record's source hash and its folder's `held_out` share, so everything made from one
    prompt lies on one side, in every folder alike. Raises ValueError where folders or shards are not what they should be.
    """

    def __init__(self, folders: str | Path | Seq[str | Path], split: str = "train") -> None:
        if split not in SPLITS:
            raise ValueError(f"split={split} must be one of {', '.join(SPLITS)}")
        self.split = split
        self.folders = [Path(one) for one in ([folders] if isinstance(folders, str | Path) else folders)]
        parts: dict[str, list[Tensor]] = {}
        self._digests, self._hashes, self._chosen = list[str](), list[int](), list[int]()
        for folder in self.folders:
            manifest = read_manifest(folder)
            share = manifest["settings"].get("held_out", 0.0)
            for shard in manifest["shards"]:
                path = folder / shard["file"]
                if not path.is_file() or file_hash(path) != shard["sha256"]:
                    raise ValueError(f"{path} is missing or changed: make the data anew with another folder=")
                for name, tensor in load_file(path).items():
                    parts.setdefault(name, []).append(tensor)
                self._digests.append(shard["sha256"])
                for one in parts["source_hashes_R"][-1].tolist():
                    if split == "all" or is_held_out(one, share) == (split == "held_out"):
                        self._chosen.append(len(self._hashes))
                    self._hashes.append(one)
        empty = torch.zeros(0, dtype=torch.int64)
        self._tensors = {name: torch.cat(parts.get(name, [empty])) for name in ("token_ids_T", "loss_mask_T")}
        lengths_R = torch.cat(parts.get("lengths_R", [empty]))
        ends = lengths_R.cumsum(0).tolist()
        self._spans = list(zip([0, *ends[:-1]], ends, strict=True)) if ends else []
        self.lengths = lengths_R[self._chosen].tolist()

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Record:
        at = self._chosen[index]
        start, end = self._spans[at]
        return Record(
            self._tensors["token_ids_T"][start:end].long(),
            self._tensors["loss_mask_T"][start:end].bool(),
            self._hashes[at],
        )

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def index_in_folder(self, index: int) -> int:
        """The place of a record of this split among all of the folders."""
        return self._chosen[index]

    @property
    def name(self) -> str:
        return ", ".join(map(str, self.folders))

    @property
    def fingerprint(self) -> str:
        """Stands for the records and their split."""
        return hashlib.sha256(" ".join([*self._digests, self.split]).encode()).hexdigest()[:16]


def is_held_out(source_hash: int, share: float) -> bool:
    return source_hash % _PARTS < round(share * _PARTS)


def read_manifest(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no {MANIFEST}: make training data there with `specdec data folder=...`"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / MANIFEST} is not JSON: {error}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces the file in one step."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_settings(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            raise ValueError(
                f"{folder} was made with {name}={old.get(name)!r}, not {new.get(name)!r}: choose another folder="
            )
