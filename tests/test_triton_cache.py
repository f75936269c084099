"""The Triton kernels that write and move keys and values, against their references; and the engine through all of them."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import make_tiny
from torch import Tensor

from specdec.drafters import SmallModelDrafter
from specdec.drafters.growth import Static
from specdec.engine import Engine
from specdec.kernels import dispatch
from specdec.kernels.kv_write import kv_write
from specdec.kernels.path_commit import path_commit
from specdec.kernels.path_commit.triton import MAX_MOVES
from specdec.model import PagedModel
from specdec.sampling import SamplingParams
from specdec.verifiers import Verifier

DEVICE = "cpu" if dispatch.is_interpreting() else "cuda"


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv("SPECDEC_KERNELS", "triton")


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 64, 40), (8, 256, 256)], ids=str)
def test_new_tokens_reach_their_slots_and_no_other(shape, dtype):
    groups, key_size, value_size = shape
    slots = torch.tensor([7, 2, 11, 4], device=DEVICE)
    caches = [torch.full((13, groups, size), torch.nan, dtype=dtype, device=DEVICE) for size in (key_size, value_size)]
    # As attention hands them over: heads first, and in the dtype of the computation.
    new = [numbers(groups, 4, size, seed=size).transpose(0, 1) for size in (key_size, value_size)]
    kv_write(*caches, slots, None, *new)
    for cache, one in zip(caches, new, strict=True):
        assert torch.equal(cache[slots], one.to(dtype))
        assert int(cache.isnan().sum()) == 9 * cache[0].numel()


def test_a_run_of_slots_and_no_token_at_all():
    caches = [torch.zeros(9, 2, 4, device=DEVICE) for _ in range(2)]
    new = [numbers(3, 2, 4, seed=seed) for seed in (1, 2)]
    kv_write(*caches, torch.arange(4, 7, device=DEVICE), 4, *new)
    assert all(torch.equal(cache[4:7], one) for cache, one in zip(caches, new, strict=True))
    kv_write(*caches, torch.arange(0, device=DEVICE), 4, *(one[:0] for one in new))


def test_tensors_that_do_not_fit_are_refused():
    caches = [torch.zeros(9, 2, 4, device=DEVICE) for _ in range(2)]
    with pytest.raises(ValueError, match=r"values \[3, 2, 5\] do not fit 3 slots of \[2, 4\]"):
        kv_write(*caches, torch.arange(3, device=DEVICE), None, numbers(3, 2, 4), numbers(3, 2, 5))
    with pytest.raises(ValueError, match=r"sources \[1, 2\] and targets \[1, 3\] must be alike"):
        path_commit([caches[0][None]], torch.zeros(1, 2).long(), torch.zeros(1, 3).long())


def moved(cache: Tensor, sources: list[list[int]], targets: list[list[int]]) -> Tensor:
    """One slot after another, from a copy."""
    after = cache.clone()
    for row_sources, row_targets in zip(sources, targets, strict=True):
        for source, target in zip(row_sources, row_targets, strict=True):
            if target >= 0:
                after[:, target] = cache[:, source]
    return after


MOVES = {
    "an accepted path": ([[3, 4, 6, 9]], [[3, 4, 5, 6]]),
    "a slot is source and target": ([[5, 6, 7, 8]], [[4, 5, 6, 7]]),
    "a swap": ([[1, 2]], [[2, 1]]),
    "a cycle the other way": ([[1, 2, 3, 4, 5]], [[2, 3, 4, 5, 1]]),
    "ragged rows": ([[2, 3, -1], [9, -1, -1], [12, 15, 14]], [[1, 2, -1], [10, -1, -1], [13, 14, 15]]),
    "nothing but padding": ([[-1, -1]], [[-1, -1]]),
}


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 5, 96)], ids=str)
def test_moves_happen_at_once(name, shape):
    layers, groups, size = shape
    sources, targets = MOVES[name]
    caches = [numbers(layers, 17, groups, size, dtype=dtype, seed=1) for dtype in (torch.float32, torch.bfloat16)]
    wanted = [moved(cache, sources, targets) for cache in caches]
    path_commit(caches, *(torch.tensor(one, device=DEVICE) for one in (sources, targets)))
    assert all(map(torch.equal, caches, wanted))


@pytest.mark.parametrize("count", [1, 100, MAX_MOVES + 1])
def test_many_moves_in_a_row(count):
    places = random.Random(count).sample(range(2 * count), 2 * count)
    sources, targets = [places[:count]], [sorted(places[count // 2 : count // 2 + count])]
    cache = numbers(2, 2 * count, 1, 20, seed=3)
    wanted = moved(cache, sources, targets)
    path_commit([cache], *(torch.tensor(one, device=DEVICE) for one in (sources, targets)))
    assert torch.equal(cache, wanted)


def test_speculative_text_through_the_kernels_is_plain_text(monkeypatch):
    """Trees of target and draft model and chunks of prompts, all interpreted, against plain decoding by the references."""
    target, draft = PagedModel(make_tiny().to(DEVICE)), PagedModel(make_tiny(noise=0.03).to(DEVICE))
    prompts = [[5, 6, 7, 5, 6, 7, 5, 6], [9, 8, 7]]
    params = SamplingParams(temperature=0.7, seed=1, max_new_tokens=6, ignore_eos=True)
    with monkeypatch.context() as patch:
        patch.setenv("SPECDEC_KERNELS", "reference")
        plain = Engine(Verifier(target), max_batch_size=1).generate(prompts, params)
    options = {"max_batch_size": 2, "prefill_chunk": 5, "page_size": 4}
    engine = Engine(Verifier(target), SmallModelDrafter(draft), Static([[0], [1], [0, 0], [1, 0]]), **options)
    results = engine.generate(prompts, params)
    assert [r.token_ids for r in results] == [r.token_ids for r in plain]
    assert sum(sum(r.metrics.accepted_by_depth) for r in results) > 3


def test_who_serves_a_tensor(monkeypatch):
    cpu = torch.zeros(1)
    assert dispatch.use_triton(torch.zeros(1, device=DEVICE))
    with pytest.raises(ValueError, match="SPECDEC_KERNELS=triton, but heads are odd, or unset SPECDEC_KERNELS"):
        dispatch.use_triton(torch.zeros(1, device=DEVICE), "heads are odd")
    monkeypatch.setattr(dispatch, "is_interpreting", lambda: False)
    with pytest.raises(ValueError, match="the tensors are on cpu; set TRITON_INTERPRET=1"):
        dispatch.use_triton(cpu)
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    with pytest.raises(ValueError, match=r"triton cannot be imported; install specdec\[triton\]"):
        dispatch.use_triton(cpu)
    monkeypatch.setenv("SPECDEC_KERNELS", "reference")
    assert not dispatch.use_triton(cpu)
    monkeypatch.setenv("SPECDEC_KERNELS", "cuda")
    with pytest.raises(ValueError, match="'cuda' is unknown; use auto, reference or triton"):
        dispatch.use_triton(cpu)
    for auto in ("", "auto"):
        monkeypatch.setenv("SPECDEC_KERNELS", auto)
        assert not dispatch.use_triton(cpu)
