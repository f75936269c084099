"""Checks that a model has passed, remembered on disk: named by everything that the outcome depends on."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence as Seq
from contextlib import suppress
from pathlib import Path

import torch
import transformers

import specdec
from specdec.kernels import cpu, kv_write, linear, path_commit, tree_attention
from specdec.model import PagedModel


def record_of(model: PagedModel, check: str, sources: Seq[str], *more: object) -> Path | None:
    """The file that records a pass of `check`; None where there is no cache folder.

    `sources` are the modules of the core, beside the kernels' own files, whose change makes it void, `more` whatever
    else does.
    """
    config = model.model.config.to_dict()
    for name in ("_name_or_path", "name_or_path", "transformers_version"):
        config.pop(name, None)
    folders = [Path(str(folder.__file__)).parent for folder in (tree_attention, kv_write, path_commit, cpu, linear)]
    kernel = sorted(file for folder in folders for file in folder.iterdir() if file.is_file())
    core = [Path(__file__).with_name(f"{name}.py") for name in sources]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (*core, *kernel)]
    versions = [torch.__version__, transformers.__version__, specdec.__version__, os.environ.get("SPECDEC_KERNELS", "")]
    place = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else _cpu()
    key = [config, f"{type(model.model).__module__}.{type(model.model).__qualname__}", versions, digests, place, more]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    try:
        folder = os.environ.get("SPECDEC_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    base = Path(folder) if os.environ.get("SPECDEC_CACHE") else Path(folder) / "specdec"
    return base / check / f"{digest[:32]}.json"


def _cpu() -> str:
    """What the CPU's kernels are built for."""
    return cpu.instruction_set() if cpu.can_run() else "none"


def remember(record: Path | None, model: PagedModel, **found: object) -> None:
    """Written whole or not at all, with what was `found`; a folder that cannot be written costs a check next time."""
    if record is None:
        return
    with suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=record.parent, suffix=".tmp", delete=False) as file:
            json.dump({"model": model.name, "class": type(model.model).__qualname__, **found}, file)
        os.replace(file.name, record)
