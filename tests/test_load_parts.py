"""The parts of a load: arrivals, requests, the loop that drives a server, medians, crossover."""

from __future__ import annotations

import io
import itertools
import statistics
from collections import Counter, deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from specdec.experiments.arrivals import ClosedLoop, OpenLoop, poisson_times
from specdec.experiments.driving import Emission, Served, TurnClock, drive
from specdec.experiments.load_contenders import LoadContender
from specdec.experiments.load_rows import LoadRun, Point, crossover, load_row
from specdec.experiments.load_session import Session
from specdec.experiments.resume import Measurements
from specdec.experiments.workload import Lengths, LoadRequest, Texts, Workload
from specdec.live import Gauges, LiveView
from specdec.sampling import SamplingParams


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.seconds = 100.1

    def now(self) -> float:
        return self.seconds

    def wait(self, seconds: float) -> None:
        self.seconds += seconds


class Server:
    """Gives each of the first `places` open requests `per_step` tokens in a step of a second."""

    def __init__(self, clock: Clock, places: int, per_step: int = 1) -> None:
        self.clock, self.places, self.per_step = clock, places, per_step
        self.open: deque[tuple[LoadRequest, list[int]]] = deque()
        self.most_open = 0

    @property
    def is_idle(self) -> bool:
        return not self.open

    def submit(self, request: LoadRequest) -> None:
        self.open.append((request, []))
        self.most_open = max(self.most_open, len(self.open))

    def step(self, wait_s: float | None) -> list[Emission]:
        self.clock.seconds += 1.0
        found = []
        for request, tokens in list(self.open)[: self.places]:
            new = [request.index] * min(self.per_step, request.params.max_new_tokens - len(tokens))
            tokens += new
            is_last = len(tokens) == request.params.max_new_tokens
            found.append(Emission(request.index, new, self.clock.now(), is_last))
            if is_last:
                self.open.remove((request, tokens))
        return found


def make_requests(count: int, num_tokens: int = 3) -> list[LoadRequest]:
    return [LoadRequest(i, "set", [5], SamplingParams(max_new_tokens=num_tokens, seed=i)) for i in range(count)]


def test_poisson_arrivals_have_their_rate_and_one_pattern() -> None:
    slow, fast = (poisson_times(rate, 4000, seed=3) for rate in (0.5, 8.0))
    assert [time * 0.5 for time in slow] == pytest.approx([time * 8.0 for time in fast])
    gaps = [b - a for a, b in itertools.pairwise([0.0, *fast])]
    assert min(gaps) > 0
    # An exponential law: mean and standard deviation agree; 4000 draws leave an error of 1.6 %.
    assert statistics.fmean(gaps) == pytest.approx(1 / 8, rel=0.07)
    assert statistics.stdev(gaps) == pytest.approx(1 / 8, rel=0.1)
    assert poisson_times(8.0, 10, seed=3) == fast[:10] != poisson_times(8.0, 10, seed=4)
    for rate in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="rate="):
            poisson_times(rate, 1, 0)


def test_open_loop_counts_from_when_a_request_is_sent() -> None:
    clock = Clock()
    served = drive(Server(clock, places=1), OpenLoop(make_requests(3), [0.5, 1.0, 9.0]), clock)
    assert [one.arrival_s for one in served] == [0.5, 1.0, 9.0]
    # The first runs from 0.5 to 3.5, the second waits for it, the third finds nobody.
    assert [one.ttft_s for one in served] == pytest.approx([1.0, 3.5, 1.0])
    assert [one.token_ids for one in served] == [[0] * 3, [1] * 3, [2] * 3]
    assert [one.emissions[-1][0] for one in served] == pytest.approx([3.5, 6.5, 12.0])


def test_nothing_is_sent_after_the_duration() -> None:
    clock = Clock()
    served = drive(Server(clock, places=1), OpenLoop(make_requests(3), [0.5, 1.0, 9.0], duration_s=5.0), clock)
    assert [one.index for one in served] == [0, 1]
    # The last begins before the fifth second is over and is answered in full.
    served = drive(Server(clock, places=1), ClosedLoop(make_requests(9), 1, duration_s=5.0), clock)
    assert [len(one.token_ids) for one in served] == [3, 3]


@pytest.mark.parametrize("concurrency", [1, 2, 5])
def test_closed_loop_keeps_its_users_busy(concurrency: int) -> None:
    clock, requests = Clock(), make_requests(7)
    server = Server(clock, places=8)
    served = drive(server, ClosedLoop(requests, concurrency), clock)
    assert server.most_open == min(concurrency, 7) and len(served) == 7
    ends = sorted(one.emissions[-1][0] for one in served)
    # Every request but the first ones is sent the moment another has been answered.
    assert [one.arrival_s for one in served] == pytest.approx([0.0] * concurrency + ends[: 7 - concurrency])
    with pytest.raises(ValueError, match="concurrency=0"):
        ClosedLoop(requests, 0)


def test_contenders_who_take_turns_have_times_of_their_own(tmp_path: Path) -> None:
    clock, order, requests = Clock(), list[str](), make_requests(4)
    turns = TurnClock(clock)

    class Turning(Server):
        def __init__(self, name: str, step_s: float) -> None:
            super().__init__(clock, places=2)
            self.name, self.step_s = name, step_s

        def step(self, wait_s: float | None) -> list[Emission]:
            order.append(self.name)
            clock.seconds += self.step_s - 1.0
            return [replace(one, time_s=turns.now()) for one in super().step(wait_s)]

        def cost(self) -> dict[str, Any]:
            clock.seconds += 50.0
            return {}

        def gauges(self) -> Gauges:
            return Gauges()

        def close(self) -> None:
            order.append(f"{self.name} ends")

    servers = {"slow": 3.0, "fast": 1.0}
    contenders = {
        name: LoadContender(name, False, {}, lambda name=name, step_s=step_s: Turning(name, step_s))
        for name, step_s in servers.items()
    }
    path = tmp_path / "raw.jsonl"
    path.touch()
    session = Session(contenders, requests, Measurements(path), {}, turns)
    point = Point("concurrency", 2)
    with LiveView(Console(file=io.StringIO()), clock.now) as view:
        runs = session.serve_all([point], 2, view)
    for name, step_s in servers.items():
        assert [run.seconds for run in runs[name, point]] == pytest.approx([6 * step_s] * 2)
    # Behind the warm-up of both: whoever has used least is next.
    last = order[order.index("fast ends") + 1 :]
    assert last.index("fast ends") < last.index("slow ends")
    assert last[: last.index("fast ends")].count("slow") == 2


def test_steps_are_seen_with_their_requests() -> None:
    seen: list[tuple[int, list[tuple[float, int]]]] = []

    def watch(emissions: list[Emission], served: dict[int, Served]) -> None:
        seen.extend((one.index, list(served[one.index].emissions)) for one in emissions)

    clock = Clock()
    drive(Server(clock, places=1, per_step=2), ClosedLoop(make_requests(1), 1), clock, watch)
    assert seen == [(0, [(1.0, 2)]), (0, [(1.0, 2), (2.0, 1)])]


SETS = [
    Texts("letters", [letter * 4 for letter in "abcdef"], "false", 3.0),
    Texts("digits", ["1", "22", "333"], "false", 1.0),
]
PARAMS = SamplingParams(max_new_tokens=20, seed=5)


@pytest.fixture(scope="module")
def target(tokenizer) -> SimpleNamespace:
    """As much of a target as prompts are encoded for."""
    return SimpleNamespace(tokenizer=tokenizer, vocab_size=len(tokenizer), max_positions=64, name="target")


def workload(**values: Any) -> Workload:
    return Workload(**{"sets": SETS, "params": PARAMS, **values})


def test_requests_are_drawn_by_weight_each_prompt_in_its_turn(target) -> None:
    requests = workload().requests(target, 400)
    assert [one.index for one in requests] == list(range(400))
    assert Counter(one.source for one in requests)["letters"] == pytest.approx(300, abs=40)
    digits = [tuple(one.prompt) for one in requests if one.source == "digits"]
    # Every prompt of a set comes once before any comes again.
    assert all(len(set(digits[i : i + 3])) == 3 for i in range(0, len(digits) - 2, 3))
    assert len({one.params.seed for one in requests}) == 400
    assert requests[:30] == workload().requests(target, 30) != workload(seed=1).requests(target, 30)
    assert {one.params.max_new_tokens for one in requests} == {20}


def test_lengths_follow_their_laws_and_leave_the_rest_alone(target) -> None:
    usual = workload().requests(target, 60)
    long = workload(output_length=Lengths(2, 5)).requests(target, 60)
    assert [one.prompt for one in long] == [one.prompt for one in usual]
    assert {one.params.max_new_tokens for one in long} == {2, 3, 4, 5}
    assert all(one.params.ignore_eos for one in long) and not any(one.params.ignore_eos for one in usual)
    fixed = workload(prompt_length=Lengths(9, 9)).requests(target, 60)
    assert {len(one.prompt) for one in fixed} == {9}
    assert [one.source for one in fixed] == [one.source for one in usual]
    assert {len(one.prompt) for one in workload(prompt_length=Lengths(1, 3)).requests(target, 60)} == {1, 2, 3}


def test_a_share_of_the_requests_has_one_prefix(target) -> None:
    usual = workload().requests(target, 200)
    found = workload(prefix_tokens=7, prefix_share=0.5).requests(target, 200)
    shared = [one for one in found if one.num_shared]
    assert 70 < len(shared) < 130 and {one.num_shared for one in shared} == {7}
    assert len({tuple(one.prompt[:7]) for one in shared}) == 1
    assert [one.prompt[one.num_shared :] for one in found] == [one.prompt for one in usual]
    assert all(one.num_shared for one in workload(prefix_tokens=7, prefix_share=1.0).requests(target, 20))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prefix_tokens": 3}, "prefix_share=0.0"),
        ({"prefix_share": 0.5}, "prefix_tokens=0"),
        ({"prefix_tokens": 3, "prefix_share": 1.5}, "prefix_share=1.5"),
        ({"sets": [Texts("a", ["a"], "true", 1.0)], "prompt_length": Lengths(3, 3)}, "chat=true"),
    ],
)
def test_a_workload_that_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        workload(**values)


def test_a_request_that_outgrows_the_target_is_named(target) -> None:
    with pytest.raises(ValueError, match=r"request 0 of .* 90 tokens; target takes at most 64"):
        workload(prompt_length=Lengths(70, 70)).requests(target, 1)
    with pytest.raises(ValueError, match="1 <= low <= high"):
        Lengths(4, 3)


def make_run(seconds: float, tau: float, texts: dict[str, list[int]]) -> LoadRun:
    latencies = {"ttft_p50_s": seconds / 10, "itl_p50_s": None}
    return LoadRun(seconds, sum(map(len, texts.values())), latencies, {"tau": tau, "num_preemptions": 2}, texts)


def test_rows_hold_medians_and_texts_that_differ() -> None:
    texts = {"0": [1, 2], "1": [3, 4]}
    runs = [make_run(1.0, 2.0, texts), make_run(4.0, 2.5, texts), make_run(2.0, 3.0, {**texts, "1": [3, 5], "2": [6]})]
    plain = [make_run(4.0, 1.0, texts)]
    row = load_row(runs, plain, {"0": [1, 2], "1": [3, 4]})
    assert row["tokens_per_s"] == 2.5 and row["plain_tokens_per_s"] == 1.0 and row["speedup"] == 2.5
    assert row["tau"] == 2.5 and row["efficiency"] == 1.0 and row["num_preemptions"] == 2
    assert row["ttft_p50_s"] == pytest.approx(0.2) and row["itl_p50_s"] is None
    assert (row["num_compared"], row["num_differing"], row["differing"]) == (2, 1, [1])
    assert "speedup" not in load_row(runs, None, {})


def test_a_run_is_measured_from_the_load_to_the_last_token() -> None:
    served = [Served(0, 0.5, [(1.0, 1), (2.0, 3)], [7] * 4), Served(1, 0.0, [(1.5, 1)], [8])]
    run = LoadRun.of(served, {"tau": 1.0})
    assert (run.seconds, run.num_tokens, run.tokens_per_s) == (2.0, 5, 2.5)
    assert run.latencies["ttft_p50_s"] == 1.0 and run.token_ids == {"0": [7] * 4, "1": [8]}
    with pytest.raises(ValueError, match="duration_s"):
        LoadRun.of([], {})


def test_shares_by_depth_are_medians_of_the_runs_that_came_so_deep() -> None:
    shares = [[0.5, 0.4], [0.7], [], [0.8, 0.2, 0.1]]
    runs = [LoadRun(1.0, 1, {}, {"acceptance_by_depth": one}, {"0": [1]}) for one in shares]
    row = load_row([*runs, LoadRun(1.0, 1, {}, {}, {"0": [1]})], None, {})
    assert row["acceptance_by_depth"] == pytest.approx([0.7, 0.3, 0.1])
    assert load_row(runs[2:3], None, {})["acceptance_by_depth"] == []


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1, 2.0), (2, 1.5), (4, 0.5)], 3.0),
        ([(1, 2.0), (2, 0.5), (4, 1.5), (8, 0.5)], 6.0),
        ([(1, 2.0), (2, 1.0)], None),
        ([(1, 0.9), (2, 0.8)], None),
        ([(1, 0.9), (2, 1.8)], None),
        ([(1, 3.0)], None),
    ],
)
def test_crossover_is_where_a_curve_falls_below_one_for_good(points, expected) -> None:
    assert crossover(points) == expected
