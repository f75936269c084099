"""Peak memory of contenders that run in the benchmark's own process, each measured in a fresh process that runs it alone."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from specdec.experiments.contenders import Contender
from specdec.experiments.peers.protocol import peak_memory_bytes
from specdec.sampling import SamplingParams


def peak_alone(
    build: Callable[[], Contender], prompts: list[list[int]], params: SamplingParams, num_threads: int
) -> dict[str, int | None]:
    """`peak_memory_bytes` of a fresh process that builds a contender and decodes one batch, and `peak_device_memory_bytes`,
    what torch allocated on the accelerator (None: there is none).

    `build` goes to that process: a function of a module with picklable arguments. In the benchmark's own process every
    contender would be charged with the weights of all others.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_peak, build, prompts, params, num_threads).result()
        except BrokenProcessPool:
            raise ValueError("the process that measures peak memory died: set memory=false") from None


def _peak(
    build: Callable[[], Contender], prompts: list[list[int]], params: SamplingParams, num_threads: int
) -> dict[str, int | None]:
    torch.set_num_threads(num_threads)
    build().decode(prompts, params)
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"peak_memory_bytes": peak_memory_bytes(), "peak_device_memory_bytes": device}
