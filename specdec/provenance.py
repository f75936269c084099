"""Where a number comes from: command, code revision, versions, device, date."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

from specdec.kernels.cpu import NotBuilt, instruction_set

_HERE = Path(__file__).resolve().parent


def provenance(command: str) -> dict[str, object]:
    """The fields `command`, `revision`, `versions` and `date` of a result row."""
    return {
        "command": command,
        "revision": revision(),
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def revision() -> str:
    """The git commit of this code, with `-dirty` where tracked files differ from it; `unknown` outside a repository.

    Result files are no part of the code: a row written before does not make the tree dirty.
    """
    # A package installed below some other repository must not report that repository's commit.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return "unknown"
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return "unknown"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)experiments/results")
    return commit + ("-dirty" if changed else "")


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("specdec", "torch", "transformers")} | {
        "python": platform.python_version()
    }


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the processor's with the number of cores this process may use and what its kernels are built
    for: processors of one name may have more or fewer instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{_processor()} ({cores} cores{_instructions()})"


def _instructions() -> str:
    try:
        return f", {instruction_set()}"
    except (NotBuilt, ValueError):
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(_HERE), *words], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
