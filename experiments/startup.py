"""The way from nothing to the first token, in a fresh process."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specdec.config import CostsConfig


def startup_seconds(config: CostsConfig) -> list[dict[str, Any]]:
    """With an empty cache folder, then with what the first process has left there: seconds until the interpreter has its
    imports, the target and the drafter are loaded, the engine is set up, and one token is there; `seconds` is all of it, and
    `num_cached` the files in that folder before."""
    found = []
    with tempfile.TemporaryDirectory() as folder, _cache(folder):
        for cached in (False, True):
            num_cached = sum(path.is_file() for path in Path(folder).rglob("*"))
            begin = time.perf_counter()
            # Its own process, or imports and caches in memory would be this one's.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                parts = pool.submit(_first_token, config).result()
            whole = time.perf_counter() - begin
            imported = whole - sum(parts.values())
            found.append({"cached": cached, "num_cached": num_cached, "seconds": whole, "import_s": imported, **parts})
    return found


def _first_token(config: CostsConfig) -> dict[str, float]:
    from specdec.experiments.system import load_system, load_target
    from specdec.sampling import SamplingParams

    marks = [time.perf_counter()]
    target = load_target(config.target)
    system = load_system(config)
    marks.append(time.perf_counter())
    engine = system.engine(target, config.engine)
    marks.append(time.perf_counter())
    engine.generate([[3, 4, 5]], SamplingParams(max_new_tokens=1, ignore_eos=True, seed=0))
    marks.append(time.perf_counter())
    names = ("load_s", "setup_s", "first_token_s")
    return {name: end - begin for name, (begin, end) in zip(names, itertools.pairwise(marks), strict=True)}


@contextmanager
def _cache(folder: str) -> Iterator[None]:
    before = os.environ.get("SPECDEC_CACHE")
    os.environ["SPECDEC_CACHE"] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ["SPECDEC_CACHE"]
        else:
            os.environ["SPECDEC_CACHE"] = before
