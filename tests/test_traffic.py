"""Requests that come and go: whatever is shared, preempted or cancelled, each text is that of the request alone."""

from __future__ import annotations

import gc
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from traffic import LONGEST, PARAMS, PLAIN, PROMPTS, STEMS, SYSTEMS, System, Traffic, target

from specdec import SamplingParams
from specdec.drafters import SmallModelDrafter, chain
from specdec.provenance import device_name, provenance


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

    @rule(number=st.integers(0, 100), cut=st.integers(0, 3))
    def follow_up(self, number: int, cut: int) -> None:
        self.traffic.follow_up(number, cut)

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


def soak(system: str, count: int, seed: int, after: Callable[[Traffic, int], None] = lambda *_: None) -> Traffic:
    """`count` requests at random times, a tenth of them cancelled, in an engine that is short of pages; `after` each."""
    chance = random.Random(seed)
    traffic = Traffic(SYSTEMS[system], page_size=4, num_pages=15, prefill_chunk=8, max_batch_size=4)
    for number in range(1, count + 1):
        if traffic.open and chance.random() < 0.2:
            traffic.follow_up(chance.randrange(100), chance.randrange(4))
        else:
            traffic.submit(chance.randrange(len(PROMPTS)), chance.randrange(len(PARAMS)))
        while len(traffic.open) > 6 or chance.random() < 0.3:
            traffic.step()
        if chance.random() < 0.1:
            traffic.cancel(chance.randrange(100))
        after(traffic, number)
    traffic.finish()
    assert traffic.num_compared + traffic.num_cancelled == count
    return traffic


@pytest.mark.parametrize(
    "system", ["small rejection", "eagle traversal", "medusa recursive", "ngram", "union adaptive"]
)
def test_soak(system: str) -> None:
    metrics = soak(system, 60, seed=1).engine.metrics
    assert metrics.num_preemptions > 0 and metrics.num_prefix_tokens > 100 and metrics.num_cancelled > 0
    assert metrics.num_pages == 15 and 0 < metrics.occupancy <= 1


@pytest.mark.parametrize("system", ["small", "eagle"])
def test_a_drafter_has_the_same_keys_behind_a_shared_prefix_as_alone(system: str) -> None:
    """The second prompt parts from the first at the end of a page, behind which EAGLE's next entry reads another token."""
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    first, second = [3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [3, 4, 5, 6, 7, 8, 9, 10, 4, 6, 6]
    found = []
    for share_prefixes in (False, True):
        engine = SYSTEMS[system].engine(page_size=4, share_prefixes=share_prefixes)
        engine.generate([first], params)
        handle = engine.submit(second, params)
        while not handle.request.sequence.round > 1:
            engine.step()
        assert handle.metrics.num_prefix_tokens == (8 if share_prefixes else 0)
        assert engine.drafter._num_read(handle.id) > 8
        cache, table = engine.drafter._cache, handle.request.sequence.table
        # In the first slot no entry of EAGLE's lies.
        found.append([states[1:].clone() for states in cache.gather(0, table, 9)])
    for alone, shared in zip(*found, strict=True):
        torch.testing.assert_close(shared, alone)


def test_a_prompt_that_many_share_is_computed_once() -> None:
    params = [SamplingParams(temperature=1.0, max_new_tokens=6, ignore_eos=True, seed=seed) for seed in range(8)]
    for system in ("plain", "small", "eagle", "medusa", "union"):
        engine = SYSTEMS[system].engine(page_size=4, prefill_chunk=8, max_batch_size=8)
        engine.generate([PROMPTS[14]] * 8, params)
        # 15 tokens before the root are three pages and a part.
        assert len(PROMPTS[14]) == 16 and engine.metrics.num_prefill_tokens == 15 + 7 * 3
        assert engine.metrics.num_prefix_tokens == 7 * 12


@pytest.mark.parametrize(
    ("system", "is_shared"), [("plain", True), ("eagle", True), ("medusa", True), ("ngram", True), ("small", False)]
)
@pytest.mark.parametrize("length", [1, 2])
def test_a_prompt_of_many_short_answers_is_computed_once_where_nobody_must_draft_for_that(
    system: str, is_shared: bool, length: int
) -> None:
    """A small model runs no text that it does not draft behind: nobody waits for pages that it will not complete."""
    params = [SamplingParams(temperature=1.0, max_new_tokens=length, ignore_eos=True, seed=seed) for seed in range(8)]
    engine = SYSTEMS[system].engine(page_size=4, prefill_chunk=64, max_batch_size=8)
    engine.generate([PROMPTS[14]] * 8, params)
    assert engine.metrics.num_prefill_tokens == (15 + 7 * 3 if is_shared else 8 * 15)


def test_pages_go_though_more_was_announced_behind_them() -> None:
    """A request whose prompt is what another is about to say announces those pages; the other overtakes it, fills them and
    ends, so that nobody uses them while the first has yet to come there."""
    first, more = SamplingParams(max_new_tokens=12, ignore_eos=True), SamplingParams(max_new_tokens=3, ignore_eos=True)
    own = System(lambda: SmallModelDrafter(target()), chain(3))
    answer = PLAIN.engine().generate([PROMPTS[3]], first)[0].token_ids
    behind = [*PROMPTS[3], *answer, 4, 5, 6, 7]
    wanted = PLAIN.engine().generate([behind], more)[0].token_ids
    engine = own.engine(page_size=2, prefill_chunk=1)
    ahead = engine.submit(PROMPTS[3], first)
    while not ahead.request.sequence.round:
        engine.step()
    followers = [engine.submit(behind, more) for _ in range(2)]
    while not ahead.is_done:
        engine.step()
    idle = [node for node in engine.prefixes._idle if node.children]
    assert any(child.is_coming for node in idle for child in node.children.values()), "nothing was overtaken"
    engine.prefixes.evict(engine.prefixes.num_idle)
    engine.check()
    while not engine.is_idle:
        engine.step()
        engine.check()
    assert [one.result.token_ids for one in followers] == [wanted, wanted]


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    """It is admitted while the long one is being read, and read in the next step; the long one goes on meanwhile."""
    long, short = list(STEMS[0]) * 4, [4, 4, 6, 6, 5]
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    wanted = [one.token_ids for one in PLAIN.engine().generate([long, short, long[::-1]], params)]
    engine = PLAIN.engine(page_size=4, prefill_chunk=16, max_batch_size=4)
    first = engine.submit(long, params)
    engine.step()
    handles = [first, engine.submit(short, params), engine.submit(long[::-1], params)]
    engine.step()
    assert [one.id for one in engine.running] == [0, 1] and [one.id for one in engine.waiting] == [2]
    assert handles[1].metrics.num_new_tokens == 1 and first.request.sequence.num_computed == 16 + 12
    while not engine.is_idle:
        engine.step()
    assert [one.result.token_ids for one in handles] == wanted
    assert engine.metrics.num_prefill_tokens == sum(map(len, (long, short, long))) - 3


@pytest.mark.skipif("SPECDEC_SOAK" not in os.environ, reason="make soak runs it: ten thousand requests")
@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_long_soak(system: str) -> None:
    """Nothing piles up in an engine that has served many: neither objects nor memory grow after the first two fifths."""
    count = -(-10_000 // len(SYSTEMS))
    objects, resident = [], []

    def look(traffic: Traffic, number: int) -> None:
        if number % (count // 5) == 0:
            gc.collect()
            objects.append(len(gc.get_objects()))
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    traffic = soak(system, count, seed=11, after=look)
    metrics = traffic.engine.metrics
    assert metrics.num_preemptions > 0 and metrics.num_prefix_tokens > 0
    if (path := os.environ["SPECDEC_SOAK"]) != "1":
        row = {
            "experiment": "soak",
            "system": "specdec",
            "name": system,
            "num_requests": count,
            "num_cancelled": traffic.num_cancelled,
            "num_compared": traffic.num_compared,
            "num_differing": 0,
            "num_steps": metrics.num_steps,
            "num_preemptions": metrics.num_preemptions,
            "num_prefix_tokens": metrics.num_prefix_tokens,
            "num_objects": objects,
            "resident_mib": [round(size / 2**20, 1) for size in resident],
            "device": device_name(torch.device("cpu")),
            **provenance(f"SPECDEC_SOAK={path} make soak"),
        }
        with Path(path).open("a", encoding="utf-8") as rows:
            rows.write(json.dumps(row) + "\n")
    assert max(objects[2:]) < objects[1] * 1.02, objects
    assert max(resident[2:]) < resident[1] * 1.02, resident
