"""What a device gives: copies, attention, forwards and steps, timed where the time is spent."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from specdec.graphs import ForwardGraphs
from specdec.kernels.tree_attention import tree_attention
from specdec.kv_cache import KVCache, LayerShape
from specdec.model import PagedModel, Segment, plan_attention
from specdec.pages import PagePool, PageTable
from specdec.stand_in import ModelShape

_WARM_UPS = 3
# So much is read between two readings of the same bytes that no cache of a GPU holds it.
_SPREAD_BYTES = 512 << 20
_MAX_LAYERS = 64


def wall_seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median time from a call to its end on the device."""
    return in_turns([run], device, repeats)[0]


def in_turns(runs: Sequence[Callable[[], object]], device: torch.device, repeats: int) -> list[float]:
    """The same for each of `runs`, all of them `repeats` times by turns: a machine that slows down does so for all."""
    times: list[list[float]] = [[] for _ in runs]
    for i in range(_WARM_UPS + repeats):
        for run, found in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            _wait(device)
            if i >= _WARM_UPS:
                found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]


def device_seconds(runs: Sequence[Callable[[], object]], device: torch.device, repeats: int) -> float:
    """The mean time of `runs`, one behind another without the host in between: on CUDA recorded as one graph."""
    if device.type != "cuda":
        return wall_seconds(lambda: [run() for run in runs], device, repeats) / len(runs)
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        for run in runs:
            run()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    times = []
    for i in range(_WARM_UPS + repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= _WARM_UPS:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times) / len(runs)


def copy_bandwidth(device: torch.device, num_bytes: int, repeats: int) -> float:
    """Bytes per second, read and written, of a copy from device memory to device memory."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / device_seconds([lambda: target.copy_(source)], device, repeats)


@torch.inference_mode()
def attention_bandwidth(
    shape: ModelShape,
    batch: int,
    nodes: int,
    context: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
) -> float:
    """Bytes of keys and values read per second by the tree attention of `batch` sequences, in layers one after another."""
    element = torch.empty(0, dtype=dtype).element_size()
    read = 2 * batch * (context + nodes) * shape.num_kv_heads * shape.head_size * element
    layers = 1 if device.type == "cpu" else min(_MAX_LAYERS, -(-_SPREAD_BYTES // read))
    pool, segments = trees(batch, nodes, context, device)
    heads = LayerShape(shape.num_kv_heads, shape.head_size, shape.head_size)
    cache = KVCache(pool, [heads] * layers, dtype, device)
    fill(cache)
    plan = plan_attention(segments, device)
    query_THE = torch.randn(batch * nodes, shape.num_heads, shape.head_size, dtype=dtype, device=device)

    def attend(layer: int) -> object:
        return tree_attention(query_THE, *cache.layer(layer), plan, scaling=shape.head_size**-0.5)

    runs = [partial(attend, layer) for layer in range(layers)]
    return read / device_seconds(runs, device, repeats)


@contextmanager
def forward_runs(
    target: PagedModel, batch: int, counts: Sequence[int], context: int, cuda_graphs: bool
) -> Iterator[list[Callable[[], object]]]:
    """A forward of `batch` trees for each number of nodes, its planning on the host included."""
    caches, runs = list[KVCache](), list[Callable[[], object]]()
    try:
        for nodes in counts:
            pool, segments = trees(batch, nodes, context, target.device)
            caches.append(target.new_cache(pool))
            fill(caches[-1])
            if cuda_graphs and target.device.type == "cuda":
                caches[-1].graphs = ForwardGraphs(target.device)
            runs.append(partial(target.forward, segments, caches[-1]))
        yield runs
    finally:
        for cache in caches:
            cache.release()


def forward_seconds(
    target: PagedModel, batch: int, counts: Sequence[int], context: int, repeats: int, cuda_graphs: bool
) -> list[float]:
    """Times of one forward of `batch` trees, for each number of nodes in turns, until it is done."""
    with forward_runs(target, batch, counts, context, cuda_graphs) as runs:
        return in_turns(runs, target.device, repeats)


def busy_share(run: Callable[[], object], device: torch.device) -> float | None:
    """The part of the time of `run` in which the GPU computes; the rest it waits for the host. None on other devices.

    `run` is timed by itself and then once more to see what the GPU does, for whoever watches holds up the host.
    """
    if device.type != "cuda":
        return None
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    seconds = time.perf_counter() - start
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        _wait(device)
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6 / seconds


def trees(batch: int, nodes: int, context: int, device: torch.device) -> tuple[PagePool, list[Segment]]:
    """Binary trees behind contexts of one length, on pages of their own."""
    each = -(-(context + nodes) // 16)
    pool = PagePool(batch * each, page_size=16)
    parents = [-1, *((node - 1) // 2 for node in range(1, nodes))]
    seen, depths = torch.zeros(nodes, nodes, dtype=torch.bool), [0] * nodes
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node], depths[node] = seen[parent], depths[parent] + 1
        seen[node, node] = True
    segments = []
    for row in range(batch):
        table = PageTable(pool)
        table.reserve(context + nodes, 0)
        tokens = 3 + (torch.arange(nodes, device=device) + row) % 89
        positions = context + torch.tensor(depths, device=device)
        segments.append(Segment(table, context, tokens, positions, seen.to(device) if nodes > 1 else None))
    return pool, segments


def fill(cache: KVCache) -> None:
    """Numbers in all slots: zeros cost less power to multiply."""
    for layer in range(len(cache.shapes)):
        for tensor in cache.layer(layer):
            tensor.normal_()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
