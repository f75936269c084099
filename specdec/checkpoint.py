"""Checkpoint files: the tensors and the config.json of a folder, a file or a hub id, read and written."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec.loading import first_line, one_line

_PLACES = "give a checkpoint folder, a *.safetensors, *.bin or *.pt file, a hub id (owner/name), or the name of a shipped head"
_PICKLES = (".bin", ".pt", ".pth")
_SUFFIXES = (".safetensors", *_PICKLES)
# Where a folder holds several, the first one found is read: safetensors cannot run code and load faster.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "medusa_lm_head.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "medusa_lm_head.pt",
)
_CONFIG = "config.json"
_SHIPPED = Path(__file__).parent / "heads"


class DamagedCheckpointError(ValueError):
    """A checkpoint whose files are there and cannot be read as what they claim to be."""


@dataclass(frozen=True)
class Checkpoint:
    """What lies in a checkpoint: tensors by name, as stored, and config.json (empty where there is none)."""

    path: str
    files: tuple[Path, ...]
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]


def shipped_heads() -> list[str]:
    """Names of the heads that come with the project, for its default model; each can be read by its name alone."""
    return sorted(folder.name for folder in _SHIPPED.glob("*/") if (folder / _CONFIG).is_file())


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads a folder, a weight file (with the config.json beside it), a shipped head or a hub id; tensors stay on the CPU.

    Pickled files are read with `weights_only`, so they cannot run code. Raises FileNotFoundError where there is nothing,
    ValueError where a folder holds no weights or the hub does not give them, DamagedCheckpointError, which names the file,
    for one that is cut off, corrupt or holds anything but tensors.
    """
    place = _locate(os.fspath(path))
    weights = place if place.is_file() else _weights_of(place)
    folder = weights.parent
    config = _read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
    files = _shards(weights) if weights.name.endswith(".index.json") else (weights,)
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = _read_tensors(file)
        if twice := sorted(found.keys() & tensors.keys()):
            raise DamagedCheckpointError(f"{file}: {', '.join(twice)} is in another shard already")
        tensors |= found
    return Checkpoint(os.fspath(path), files, tensors, config)


def write_checkpoint(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    weights_name: str = _WEIGHTS[0],
) -> Path:
    """Writes tensors as safetensors and config.json into `folder`, which is made; returns the weight file.

    Each file appears whole or not at all, and takes the place of one of its name. Raises OSError where it cannot be written.
    """
    place = Path(folder).expanduser()
    place.mkdir(parents=True, exist_ok=True)
    weights, text = place / weights_name, json.dumps(config, indent=2) + "\n"
    own, seen = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        # safetensors takes no tensors that share memory, so what is tied becomes two.
        own[name] = plain.clone() if plain.untyped_storage().data_ptr() in seen else plain
        seen.add(plain.untyped_storage().data_ptr())
    fresh = {weights: weights.with_name(f".{weights.name}.tmp"), place / _CONFIG: place / f".{_CONFIG}.tmp"}
    try:
        save_file(own, fresh[weights], metadata={"format": "pt"})
        fresh[place / _CONFIG].write_text(text, encoding="utf-8")
        for final, written in fresh.items():
            os.replace(written, final)
    finally:
        for written in fresh.values():
            written.unlink(missing_ok=True)
    return weights


def _locate(path: str) -> Path:
    """The local file or folder, or one of the heads that come with the project; a hub id is downloaded."""
    local = Path(path).expanduser()
    if path in shipped_heads() and not local.exists():
        return _SHIPPED / path
    if local.is_dir() and path.strip():
        return local
    if local.is_file():
        if local.name.endswith((*_SUFFIXES, ".index.json")):
            return local
        raise ValueError(f"{path} is no weight file; {_PLACES}")
    if not path.strip() or path.startswith((".", "~", "/")) or path.count("/") > 1 or path.endswith(_SUFFIXES):
        raise FileNotFoundError(f"{path!r}: no such file or folder; {_PLACES}")
    with one_line(f"{path}: no such folder here, and the hub does not give it; check the name and the connection"):
        return Path(
            snapshot_download(path, allow_patterns=[_CONFIG, "*.index.json", *(f"*{end}" for end in _SUFFIXES)])
        )


def _weights_of(folder: Path) -> Path:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    others = sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES)
    if len(others) == 1:
        return others[0]
    found = (
        f"several weight files ({', '.join(file.name for file in others)}): name one" if others else "no weight file"
    )
    raise ValueError(f"{folder} holds {found}; known names are {', '.join(_WEIGHTS)}")


def _shards(index: Path) -> tuple[Path, ...]:
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise DamagedCheckpointError(f"{index}: no weight_map in it; get the checkpoint again")
    files = tuple(index.parent / name for name in sorted(set(names.values())))
    if missing := [file.name for file in files if not file.is_file()]:
        raise DamagedCheckpointError(f"{index}: the shards {', '.join(missing)} are missing; get the checkpoint again")
    return files


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedCheckpointError(f"{file} is not JSON ({first_line(error)}); get it again") from error
    if not isinstance(content, dict):
        raise DamagedCheckpointError(f"{file} holds a {type(content).__name__}, not an object; get it again")
    return content


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        content = load_file(file) if file.suffix == ".safetensors" else _unpickle(file)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise DamagedCheckpointError(
            f"{file} is cut off or corrupt ({type(error).__name__}: {first_line(error)}); get it again"
        ) from error
    strange = [
        str(name) for name, value in content.items() if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if strange or not content:
        held = f"{', '.join(strange[:4])} beside tensors" if strange else "no tensors"
        raise DamagedCheckpointError(f"{file} holds {held}; a checkpoint is a plain dict of tensors by name")
    return content


def _unpickle(file: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message advises to load without `weights_only`, which would run what the file says.
        raise pickle.UnpicklingError("no pickle of tensors alone") from error
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__}, not a dict of tensors")
    return content
