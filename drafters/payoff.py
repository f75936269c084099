"""Payoff: whether drafting pays by the clock, whatever was promised."""

from __future__ import annotations

import math
import statistics
from collections import deque


class Payoff:
    """Compares the time of steps with drafts to that of as many tokens by steps without.

    Promises are optimistic: the best of many is chosen, and some host work has no price. So every few steps with drafts, and
    the steps between them in which drafts were looked for in vain, are held against plain decoding; if that would have been
    quicker, nothing is drafted, while about as many rows run, until what was lost is no more than `explore` of the time. What
    plain steps of about as many take is the median of the last few, one of them not long ago. The time of a step with prompts
    says nothing of either, so there only drafts that have paid not long ago go on. What a drafter reads before it drafts serves
    the drafts to come: these share its time.
    """

    # How many steps with drafts, and of how many rows in all: a single row's luck changes from step to step.
    _FEWEST_STEPS, _FEWEST_ROWS = 3, 24
    # Or so many steps with drafts or without.
    _MOST_STEPS = 48
    # Texts change: however much was lost, drafts are tried again behind so many steps, each time behind twice as many. Few may
    # just have been unlucky.
    _SHORTEST_REST, _LONGEST_REST, _MOST_ROWS = 32, 512, 4
    # A single step's time may be anything.
    _FEWEST_PLAIN, _MOST_PLAIN = 3, 5
    _LONGEST_UNSEEN = 64
    # The part of the time for reading that is left which a step with drafts is charged.
    _CHARGED = 1 / 16

    def __init__(self, explore: float = 0.01) -> None:
        self._explore = explore
        # By about how many rows they had: what plain steps took against what was expected of them, as logarithms.
        self._errors: dict[int, deque[float]] = {}
        self._since_plain = 0
        self._spent_s = self._plain_s = self._owed_s = 0.0
        self._num_steps = self._num_drafted = self._num_rows = self._rest = self._rows = 0
        # Judgements in a row by which drafts did not pay.
        self._num_lost = 0
        # The rows of the last steps that were judged, if drafts paid.
        self._proven_rows = 0

    @property
    def is_resting(self) -> bool:
        """Whether steps without drafts are to come."""
        return self._rest > 0

    def rests(self, num_rows: int, has_prompts: bool) -> bool:
        """Whether a step that could be drafted for so many rows is to be one without, and without a thought of it."""
        if self._rest:
            self._rest -= 1
            if _alike(num_rows, self._rows):
                return True
            self._rest = self._num_lost = 0
        if has_prompts:
            return num_rows > 2 * self._proven_rows
        self._since_plain += 1
        return not self._has_seen(num_rows) or self._since_plain > self._LONGEST_UNSEEN

    def _has_seen(self, num_rows: int) -> bool:
        return len(self._errors.get(_size(num_rows), ())) >= self._FEWEST_PLAIN

    def saw_plain(self, num_rows: int, seconds: float, expected_s: float) -> None:
        """A step of `num_rows` sequences, without drafts, took so long, what was spent on looking for them left out."""
        if seconds > 0 and expected_s > 0:
            errors = self._errors.setdefault(_size(num_rows), deque(maxlen=self._MOST_PLAIN))
            errors.append(math.log(seconds / expected_s))
        self._since_plain = 0

    def saw_drafts(
        self,
        num_rows: int,
        num_tokens: int,
        seconds: float,
        expected_plain_s: float,
        in_vain: bool = False,
        reading_s: float = 0.0,
    ) -> None:
        """A step of `num_rows` sequences, with drafts or after looking for some `in_vain`, took so long in all, `reading_s` of
        it for texts that will not be read again, and brought so many tokens."""
        self._owed_s += reading_s
        if not self._has_seen(num_rows):
            return
        step_s = expected_plain_s * math.exp(statistics.median(self._errors[_size(num_rows)]))
        self._spent_s += seconds - reading_s
        self._plain_s += num_tokens / num_rows * step_s
        self._num_steps += 1
        if not in_vain:
            charged_s = self._CHARGED * self._owed_s
            self._owed_s -= charged_s
            self._spent_s += charged_s
            self._num_drafted += 1
            self._num_rows += num_rows
        is_enough = self._num_drafted >= self._FEWEST_STEPS and self._num_rows >= self._FEWEST_ROWS
        if not is_enough and self._num_steps < self._MOST_STEPS:
            return
        lost_s = self._spent_s - self._plain_s
        if lost_s > 0:
            # Texts that are not drafted for have been read for nothing.
            lost_s, self._owed_s = lost_s + self._owed_s, 0.0
            enough = math.ceil(lost_s / (self._explore * step_s))
            most = self._SHORTEST_REST * min(num_rows, self._MOST_ROWS) << self._num_lost
            self._rest, self._rows = max(self._SHORTEST_REST, min(enough, most, self._LONGEST_REST)), num_rows
            self._num_lost, self._proven_rows = min(self._num_lost + 1, 4), 0
        else:
            self._num_lost, self._proven_rows = 0, num_rows
        self._spent_s = self._plain_s = 0.0
        self._num_steps = self._num_drafted = self._num_rows = 0


def _alike(one: int, other: int) -> bool:
    """Whether two numbers of rows are within a factor of 1.5."""
    return 3 * min(one, other) >= 2 * max(one, other)


def _size(num_rows: int) -> int:
    """The same for numbers of rows that are much alike."""
    return round(math.log(num_rows, 1.5))
