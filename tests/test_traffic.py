"""Requests that come and go: whatever is shared, preempted or cancelled, each text is that of the request alone."""

from __future__ import annotations

import gc
import os
import random

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from traffic import LONGEST, PARAMS, PROMPTS, SYSTEMS, Traffic

from specdec import SamplingParams


class Comings(RuleBasedStateMachine):
    """Any system under any order of submissions, steps and cancellations, short of pages more often than not."""

    traffic: Traffic

    @initialize(
        system=st.sampled_from(sorted(SYSTEMS)),
        page_size=st.sampled_from([1, 2, 4]),
        spare=st.none() | st.integers(0, 30),
        prefill_chunk=st.sampled_from([1, 3, 8, 64]),
        max_batch_size=st.integers(1, 4),
        share_prefixes=st.booleans() | st.just(True),
    )
    def begin(self, system, page_size, spare, prefill_chunk, max_batch_size, share_prefixes) -> None:
        num_pages = None if spare is None else -(-(LONGEST + spare) // page_size)
        self.traffic = Traffic(
            SYSTEMS[system],
            page_size=page_size,
            num_pages=num_pages,
            prefill_chunk=prefill_chunk,
            max_batch_size=max_batch_size,
            share_prefixes=share_prefixes,
        )

    @rule(prompt=st.integers(0, len(PROMPTS) - 1), params=st.integers(0, len(PARAMS) - 1), count=st.integers(1, 3))
    def submit(self, prompt: int, params: int, count: int) -> None:
        for _ in range(count):
            self.traffic.submit(prompt, params)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.traffic.step()

    @rule(number=st.integers(0, 100))
    def cancel(self, number: int) -> None:
        self.traffic.cancel(number)

    def teardown(self) -> None:
        if hasattr(self, "traffic"):
            self.traffic.finish()


TestComings = Comings.TestCase
TestComings.settings = settings(
    max_examples=40,
    stateful_step_count=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def soak(system: str, count: int, seed: int) -> Traffic:
    """`count` requests at random times, a tenth of them cancelled, in an engine that is short of pages."""
    chance = random.Random(seed)
    traffic = Traffic(SYSTEMS[system], page_size=4, num_pages=15, prefill_chunk=8, max_batch_size=4)
    for _ in range(count):
        traffic.submit(chance.randrange(len(PROMPTS)), chance.randrange(len(PARAMS)))
        while len(traffic.open) > 6 or chance.random() < 0.3:
            traffic.step()
        if chance.random() < 0.1:
            traffic.cancel(chance.randrange(100))
    traffic.finish()
    assert traffic.num_compared + traffic.num_cancelled == count
    return traffic


@pytest.mark.parametrize("system", ["small rejection", "eagle traversal", "medusa recursive", "ngram", "union"])
def test_soak(system: str) -> None:
    metrics = soak(system, 60, seed=1).engine.metrics
    assert metrics.num_preemptions > 0 and metrics.num_prefix_tokens > 100 and metrics.num_cancelled > 0
    assert metrics.num_pages == 15 and 0 < metrics.occupancy <= 1


@pytest.mark.parametrize("system", ["small", "eagle"])
def test_a_drafter_has_the_same_keys_behind_a_shared_prefix_as_alone(system: str) -> None:
    """The second prompt parts from the first at the end of a page, where EAGLE's last entry reads another token."""
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    first, second = [3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [3, 4, 5, 6, 7, 8, 9, 10, 4, 6, 6]
    found = []
    for share_prefixes in (False, True):
        engine = SYSTEMS[system].engine(page_size=4, share_prefixes=share_prefixes)
        engine.generate([first], params)
        handle = engine.submit(second, params)
        while not handle.request.sequence.round > 1:
            engine.step()
        assert handle.metrics.num_prefix_tokens == (8 - engine.drafter.overlap if share_prefixes else 0)
        assert engine.drafter.covered(handle.id) > 8
        cache, table = engine.drafter._cache, handle.request.sequence.table
        found.append([states.clone() for states in cache.gather(0, table, 9)])
    for alone, shared in zip(*found, strict=True):
        torch.testing.assert_close(shared, alone)


def test_a_prompt_that_many_share_is_computed_once() -> None:
    params = [SamplingParams(temperature=1.0, max_new_tokens=6, ignore_eos=True, seed=seed) for seed in range(8)]
    for system in ("plain", "small", "eagle", "medusa", "union"):
        engine = SYSTEMS[system].engine(page_size=4, prefill_chunk=8, max_batch_size=8)
        engine.generate([PROMPTS[14]] * 8, params)
        # 16 tokens before the root are four pages; the others compute at most what overlaps. A head of a union that was not
        # asked for a tree reads its last page later than the target, and the page is shared when it has.
        late = 4 if system == "union" else 0
        assert len(PROMPTS[14]) == 16 and engine.metrics.num_prefill_tokens <= 15 + 7 * 4 + late
        shared = 7 * (12 - getattr(engine.drafter, "overlap", 0))
        assert shared - late <= engine.metrics.num_prefix_tokens <= shared


@pytest.mark.skipif("SPECDEC_SOAK" not in os.environ, reason="make soak runs it: ten thousand requests")
def test_long_soak() -> None:
    """Nothing piles up: the objects that live after every thousand requests are as many as after the first two."""
    counts = []
    systems = sorted(SYSTEMS)
    for number in range(10):
        for i, system in enumerate(systems):
            soak(system, 1000 // len(systems) + (i < 1000 % len(systems)), seed=number)
        gc.collect()
        counts.append(len(gc.get_objects()))
    assert max(counts[2:]) < counts[1] * 1.02, counts
