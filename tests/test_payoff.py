"""Whether drafting pays by the clock: rests that grow, and what ends them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from specdec import Engine, PagedModel, SamplingParams
from specdec.cost import CostModel, DraftCost, TargetCost
from specdec.drafters import NGramDrafter, SmallModelDrafter, chain
from specdec.drafters.adaptive import AdaptiveSpeculation
from specdec.drafters.payoff import Payoff
from specdec.drafters.union import UnionDrafter
from specdec.verifiers import Verifier

PLAIN_S = 0.01


def tried(
    payoff: Payoff,
    seconds: float,
    num_tokens: int = 8,
    num_rows: int = 4,
    steps: int = 6,
    reading_s: Callable[[int], float] = lambda step: 0.0,
) -> None:
    for step in range(steps):
        assert not payoff.rests(num_rows, has_prompts=False)
        reading = reading_s(step)
        payoff.saw_drafts(num_rows, num_tokens, seconds + reading, PLAIN_S, False, reading)


def rest_of(payoff: Payoff, num_rows: int = 4, limit: int = 1000) -> int:
    """Steps without drafts until the next that may have some."""
    for count in range(limit):
        if not payoff.rests(num_rows, has_prompts=False):
            return count
        payoff.saw_plain(num_rows, PLAIN_S, PLAIN_S)
    return limit


def test_plain_steps_come_first_and_then_one_now_and_then() -> None:
    payoff = Payoff()
    assert rest_of(payoff) == 3
    # Two tokens a row in twice the time of a plain step, and a little less.
    tried(payoff, 1.9 * PLAIN_S, steps=63)
    assert rest_of(payoff) == 1


@pytest.mark.parametrize("explore", [0.01, 0.006])
def test_what_a_trial_lost_is_made_up_for_by_a_rest(explore: float) -> None:
    payoff = Payoff(explore)
    rest_of(payoff)
    for _ in range(3):
        # Six tenths of a plain step.
        tried(payoff, 2.1 * PLAIN_S)
        assert payoff.is_resting
        assert rest_of(payoff) == pytest.approx(0.6 / explore, abs=1)


def test_what_is_read_once_is_charged_to_the_drafts_to_come() -> None:
    """Six steps win 1.8 plain steps and begin with reading that takes 5: many more steps are to come."""
    payoff = Payoff()
    rest_of(payoff)
    for first in (5, 0, 0):
        tried(payoff, 1.7 * PLAIN_S, reading_s=lambda step, first=first: PLAIN_S * first * (step == 0))
        assert not payoff.is_resting


def test_reading_that_never_ends_is_charged_whole() -> None:
    payoff = Payoff()
    rest_of(payoff)
    won = 0
    while not payoff.is_resting:
        # Wins 0.3 plain steps and reads for 0.5.
        tried(payoff, 1.7 * PLAIN_S, reading_s=lambda step: 0.5 * PLAIN_S)
        won += 1
        assert won < 8
    # The gain of that time is gone, and what was read before counts too.
    assert rest_of(payoff) == 128


def test_drafts_are_tried_again_however_much_they_lost_each_time_behind_more_steps() -> None:
    payoff = Payoff()
    rest_of(payoff)
    rests = []
    for _ in range(6):
        tried(payoff, 9 * PLAIN_S)
        rests.append(rest_of(payoff))
    assert rests == [128, 256, 512, 512, 512, 512]
    tried(payoff, 1.9 * PLAIN_S)
    assert rest_of(payoff) == 0
    tried(payoff, 9 * PLAIN_S)
    assert rest_of(payoff) == 128
    # A loss so small may be chance, but what looking takes has no price.
    tried(payoff, 2.0001 * PLAIN_S)
    assert rest_of(payoff) == 32


@pytest.mark.parametrize(("num_rows", "rests"), [(1, [32, 64, 128]), (2, [64, 128, 256]), (16, [128, 256, 512])])
def test_few_rows_are_tried_again_sooner(num_rows: int, rests: list[int]) -> None:
    payoff = Payoff()
    rest_of(payoff, num_rows)
    found = []
    for _ in rests:
        tried(payoff, 9 * PLAIN_S, 2 * num_rows, num_rows, max(3, 24 // num_rows))
        found.append(rest_of(payoff, num_rows))
    assert found == rests


def test_beside_prompts_only_drafts_that_have_paid_go_on() -> None:
    payoff = Payoff()
    assert payoff.rests(4, has_prompts=True)
    rest_of(payoff)
    assert payoff.rests(4, has_prompts=True)
    tried(payoff, 1.9 * PLAIN_S)
    # What pays for so many rows pays for fewer, and is hoped to for some more.
    assert [payoff.rests(num_rows, has_prompts=True) for num_rows in (1, 4, 8, 9)] == [False, False, False, True]
    tried(payoff, 9 * PLAIN_S)
    rest_of(payoff)
    assert payoff.rests(4, has_prompts=True)


def test_plain_steps_that_take_longer_than_was_calibrated_make_drafts_pay() -> None:
    payoff = Payoff()
    for _ in range(3):
        assert payoff.rests(4, has_prompts=False)
        payoff.saw_plain(4, 1.2 * PLAIN_S, PLAIN_S)
    tried(payoff, 2.1 * PLAIN_S)
    assert not payoff.is_resting


@pytest.mark.parametrize("odd_s", [0.3 * PLAIN_S, 3 * PLAIN_S])
def test_a_single_odd_step_says_nothing(odd_s: float) -> None:
    payoff = Payoff()
    for seconds in (odd_s, PLAIN_S, PLAIN_S):
        assert payoff.rests(4, has_prompts=False)
        payoff.saw_plain(4, seconds, PLAIN_S)
    tried(payoff, 1.9 * PLAIN_S)
    assert not payoff.is_resting
    tried(payoff, 2.1 * PLAIN_S)
    assert payoff.is_resting


def test_what_plain_steps_take_is_known_for_each_number_of_rows() -> None:
    payoff = Payoff()
    rest_of(payoff, 4)
    assert rest_of(payoff, 16) == 3
    # Whoever comes and goes need not be waited for again.
    assert [rest_of(payoff, num_rows) for num_rows in (4, 16, 4, 17)] == [0, 0, 0, 0]


@pytest.mark.parametrize(("num_rows", "steps"), [(1, 24), (2, 12), (8, 3), (32, 3)])
def test_the_fewer_rows_the_more_steps_are_judged_together(num_rows: int, steps: int) -> None:
    payoff = Payoff()
    rest_of(payoff, num_rows)
    tried(payoff, 2.1 * PLAIN_S, 2 * num_rows, num_rows, steps - 1)
    assert not payoff.is_resting
    tried(payoff, 2.1 * PLAIN_S, 2 * num_rows, num_rows, 1)
    assert payoff.is_resting


@pytest.mark.parametrize(("num_rows", "goes_on"), [(5, True), (3, True), (7, False), (2, False)])
def test_a_rest_is_for_about_as_many_rows(num_rows: int, goes_on: bool) -> None:
    payoff = Payoff()
    rest_of(payoff)
    tried(payoff, 2.1 * PLAIN_S)
    assert payoff.rests(4, has_prompts=True)
    # Of other numbers of rows a plain step must be seen first, but none with prompts in it.
    assert payoff.rests(num_rows, has_prompts=True)
    assert payoff.is_resting == goes_on
    assert payoff.rests(num_rows, has_prompts=False)


def test_of_other_numbers_of_rows_nothing_is_said_before_a_plain_step() -> None:
    payoff = Payoff()
    rest_of(payoff)
    for _ in range(20):
        payoff.saw_drafts(16, 32, 10 * PLAIN_S, PLAIN_S)
    assert not payoff.is_resting


def test_what_it_takes_to_look_in_vain_counts_against_drafts() -> None:
    payoff = Payoff()
    rest_of(payoff)
    # The drafts alone would have paid.
    tried(payoff, 1.9 * PLAIN_S, steps=5)
    for _ in range(20):
        payoff.saw_drafts(4, 4, 1.05 * PLAIN_S, PLAIN_S, in_vain=True)
    assert not payoff.is_resting
    tried(payoff, 1.9 * PLAIN_S, steps=1)
    assert payoff.is_resting


def test_whoever_never_finds_anything_stops_looking() -> None:
    payoff = Payoff()
    rest_of(payoff)
    for _ in range(47):
        payoff.saw_drafts(4, 4, 1.01 * PLAIN_S, PLAIN_S, in_vain=True)
        assert not payoff.is_resting
    payoff.saw_drafts(4, 4, 1.01 * PLAIN_S, PLAIN_S, in_vain=True)
    assert payoff.is_resting


class Recorder(Payoff):
    """Lets everybody go on and notes what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.plain: list[float] = []
        self.drafts: list[tuple[float, bool]] = []

    def rests(self, num_rows: int, has_prompts: bool) -> bool:
        return False

    def saw_plain(self, num_rows: int, seconds: float, expected_s: float) -> None:
        self.plain.append(seconds)

    def saw_drafts(self, num_rows, num_tokens, seconds, expected_plain_s, in_vain=False, reading_s=0.0) -> None:
        self.drafts.append((seconds, in_vain))


@pytest.mark.parametrize("pays", [False, True])
@pytest.mark.parametrize("kind", ["looks", "rests"])
def test_steps_that_look_in_vain_are_told_from_steps_that_rest(kind: str, pays: bool, tiny) -> None:
    target, policy, recorder = PagedModel(tiny(0)), chain(2), Recorder()
    drafter = UnionDrafter([NGramDrafter()]) if kind == "looks" else SmallModelDrafter(PagedModel(tiny(0)))
    row_s = 1e-9 if pays else 1.0
    costs = CostModel(TargetCost((1, 64), (0.01, 0.01 + 63 * row_s)), DraftCost(1e-9, 1e-9, 1e-9))
    speculation = AdaptiveSpeculation(policy, costs)
    speculation._payoff = recorder
    engine = Engine(Verifier(target), drafter, policy, speculation=speculation)
    engine.generate([[5, 6, 7, 5, 6, 7, 5]], SamplingParams(max_new_tokens=40, temperature=0.0, ignore_eos=True))
    in_vain = [seconds for seconds, vain in recorder.drafts if vain]
    tried = [seconds for seconds, vain in recorder.drafts if not vain]
    if kind == "looks":
        # Every step has looked; what that took is no part of a plain step.
        assert len(in_vain) == len(recorder.plain) and all(
            plain < whole for plain, whole in zip(recorder.plain, in_vain, strict=True)
        )
        assert bool(tried) == pays and (pays or in_vain)
    elif pays:
        assert len(tried) > len(recorder.plain)
    else:
        # Most steps follow from one choice.
        assert len(recorder.plain) > 30 > 5 > len(in_vain) > 0 == len(tried)
