"""Builds the C++ kernels once per machine and loads them; says why where it cannot."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC", "-fno-exceptions", "-fno-rtti")
_AVX2, _AVX512 = ("-mavx2", "-mfma"), ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
# What the kernels can be built for, the fastest first: what /proc/cpuinfo must list, and what the compiler is told.
_TARGETS = {
    "amx": (("amx_bf16", "avx512_bf16"), ("-march=sapphirerapids", "-mprefer-vector-width=512")),
    "avx512_bf16": (
        ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"),
        (*_AVX2, *_AVX512, "-mavx512bf16", "-mprefer-vector-width=512"),
    ),
    "avx512": (("avx512f", "avx512bw", "avx512dq", "avx512vl"), (*_AVX2, *_AVX512, "-mprefer-vector-width=512")),
    "avx2": (("avx2", "fma"), _AVX2),
}


class NotBuilt(RuntimeError):
    """Why there are no C++ kernels here; everything runs without them, slower."""


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels. They are built where they are first wanted (some seconds) and kept in the user's cache folder.

    Raises NotBuilt where the CPU has none of the instruction sets, there is no C++ compiler, or SPECDEC_KERNELS=reference
    forbids them; ValueError for what SPECDEC_CPU cannot mean here.
    """
    if os.environ.get("SPECDEC_KERNELS") == "reference":
        raise NotBuilt("SPECDEC_KERNELS=reference")
    # torch's own OpenMP threads are already there, under the same name; a second set would fight them for the cores.
    library = ctypes.CDLL(str(_built(instruction_set())))
    if not library.specdec_can_run():
        raise NotBuilt("the operating system does not let this process use AMX; SPECDEC_CPU=avx512_bf16 does without")
    # Addresses go as plain integers, which take half the time of pointers in the call that a step makes most.
    number, real = ctypes.c_int64, ctypes.c_float
    library.specdec_linear.argtypes = [number] * 6
    library.specdec_run.argtypes = [number] * 5
    library.specdec_room.argtypes = [number] * 4
    library.specdec_norm.argtypes = [number, number, number, number, number, real, number, number]
    library.specdec_attend.argtypes = [number] * 8
    library.specdec_grow.argtypes = [number] * 2
    library.specdec_largest.argtypes = [number] * 6
    for name in ("linear", "run", "room", "norm", "attend", "grow", "largest"):
        getattr(library, f"specdec_{name}").restype = None
    return library


def instruction_set() -> str:
    """What the kernels are built for: amx, avx512_bf16, avx512 or avx2, the fastest on this CPU, or what SPECDEC_CPU says.

    Raises NotBuilt where there is none, ValueError for one that this CPU does not have.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise NotBuilt(f"they are for Linux on x86-64, not {platform.system()} on {platform.machine()}")
    words = _cpu_words()
    here = [name for name, (needed, _) in _TARGETS.items() if words.issuperset(needed)]
    if not here:
        raise NotBuilt("this CPU has no AVX2")
    # Intel's product of pairs of bfloat16 takes longer than the two multiply-adds that do the same (2.7 times one, on Emerald
    # Rapids), AMD's no longer than one.
    is_slow = {"avx512_bf16"} if "GenuineIntel" in words else set()
    wanted = os.environ.get("SPECDEC_CPU") or next(name for name in here if name not in is_slow)
    if wanted not in here:
        raise ValueError(f"SPECDEC_CPU={wanted!r} is nothing that this CPU runs; use {' or '.join(here)}")
    return wanted


def _cpu_words() -> set[str]:
    """What the system says of the CPU: its maker and its instructions among much else."""
    return set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())


def can_run() -> bool:
    """Whether the C++ kernels run here."""
    try:
        library()
    except NotBuilt:
        return False
    return True


def _built(target: str) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NotBuilt("there is no C++ compiler: install g++")
    flags = [*_FLAGS, *_TARGETS[target][1]]
    sources = sorted([*_FOLDER.glob("*.h"), *_FOLDER.glob("*.cpp")])
    key = hashlib.sha256(" ".join([compiler, *flags]).encode())
    for source in sources:
        key.update(source.read_bytes())
    own = os.environ.get("SPECDEC_CACHE")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specdec"
    folder = base / "kernels"
    place = folder / f"{target}-{key.hexdigest()[:16]}.so"
    if not place.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Another process may build it at the same time: each writes a file of its own and puts it in place whole.
            with tempfile.TemporaryDirectory(dir=folder) as own:
                part = Path(own) / place.name
                command = [compiler, *flags, *(str(one) for one in sources if one.suffix == ".cpp"), "-o", str(part)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise NotBuilt(f"{compiler} failed: {done.stderr.strip()[-300:]}")
                os.replace(part, place)
        except OSError as error:
            raise NotBuilt(f"{folder}: {error}") from error
    return place
