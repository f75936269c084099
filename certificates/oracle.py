"""Proof by enumeration: production code run under every outcome of its random choices, each with its exact probability.

`enumerate_outcomes` puts a scripted `Noise` in the place of the counter-based one. A script forces the choices of one
case; where it ends, the first possible outcome is taken and every other one becomes a new script. Many scripts run as
rows of one batch, so ragged batches with strangers as batch mates are the normal case here, not a special one.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from specdec.certificates.simplex import MAX_RUNNERS, WHOLE, Region, area, winning
from specdec.interfaces import Acceptance
from specdec.noise import GumbelKey, Key, PositionKey, RoundKey
from specdec.tree import DrawKind, TokenTree

C = TypeVar("C")
R = TypeVar("R")
TokenSpan = tuple[int, ...]


class KeyReusedError(AssertionError):
    """One random number served two choices of a request."""


class NotALawError(AssertionError):
    """A choice was asked for with something that is no probability law in float64."""


class BatchDependentError(AssertionError):
    """Given the same earlier outcomes, a row met another choice: it depends on its batch mates or on hidden chance."""


class Choice(NamedTuple):
    """One choice that was made: its key, the outcome, and that outcome's probability."""

    key: tuple[object, ...]
    outcome: int
    prob: float


class Script:
    """One path through the choices of a case: forced as far as `forced` goes, then the first possible outcome."""

    def __init__(self, forced: list[Choice], share: bool) -> None:
        self.forced, self.made, self.prob = forced, list[Choice](), 1.0
        self.alternatives: list[list[Choice]] = []
        self._share = share
        # Where the uniform number behind each used key must lie for the outcomes so far.
        self._interval: dict[tuple[object, ...], tuple[float, float]] = {}
        # Where the exponential numbers behind each Gumbel key must lie, up to their common scale.
        self._region: dict[tuple[object, ...], Region] = {}

    def choose(self, key: tuple[object, ...], weights: list[float]) -> int:
        """The outcome of inverting the cumulative `weights` at the key's uniform number."""
        if key in self._interval and not self._share:
            raise KeyReusedError(f"key {key} is used twice")
        low, high = self._interval.get(key, (0.0, 1.0))
        step = len(self.made)
        if step < len(self.forced):
            taken = self.forced[step]
            start = sum(weights[: taken.outcome])
            interval = max(start, low), min(start + weights[taken.outcome], high)
            prob = (interval[1] - interval[0]) / (high - low)
            if taken.key != key or abs(prob - taken.prob) > 1e-12:
                raise BatchDependentError(f"choice {step} was {taken} and is now {(key, weights)}")
        else:
            possible, start = [], 0.0
            for outcome, weight in enumerate(weights):
                end = start + weight
                inside = (start if start > low else low), (end if end < high else high)
                if weight > 0 and inside[1] > inside[0]:
                    possible.append((Choice(key, outcome, (inside[1] - inside[0]) / (high - low)), inside))
                start = end
            taken, interval = possible[0]
            self.alternatives += [[*self.made, other] for other, _ in possible[1:]]
        self._interval[key] = interval
        self.made.append(taken)
        self.prob *= taken.prob
        return taken.outcome

    def race(self, key: tuple[object, ...], rates: list[float]) -> int:
        """The winner of argmin e_v / `rates`_v, the exponential e_v being the key's own; a key serves many races."""
        within = self._region.get(key, WHOLE)
        regions = winning(within, rates)
        whole = area(within)
        probs = {token: area(region) / whole for token, region in regions.items()}
        step = len(self.made)
        if step < len(self.forced):
            taken = self.forced[step]
            if taken.key != key or abs(probs.get(taken.outcome, 0.0) - taken.prob) > 1e-12:
                raise BatchDependentError(f"choice {step} was {taken} and is now {(key, rates)}")
        else:
            # A sliver that is all rounding would be an outcome of probability zero.
            possible = [Choice(key, token, prob) for token, prob in probs.items() if prob > 1e-14]
            taken = possible[0]
            self.alternatives += [[*self.made, other] for other in possible[1:]]
        self._region[key] = regions[taken.outcome]
        self.made.append(taken)
        self.prob *= taken.prob
        return taken.outcome


class Scripts:
    """The scripts of one batch; `noise` hands them to the code under test."""

    def __init__(self, forced: Iterable[list[Choice]], rows_per_case: int, share: bool) -> None:
        self.scripts = [Script(choices, share) for choices in forced]
        self.rows_per_case = rows_per_case

    def noise(
        self, owners: Seq[int] | None = None, rounds: Seq[int] | None = None, positions: Seq[int] | None = None
    ) -> EnumeratingNoise:
        """Noise for a batch whose row b belongs to `owners[b]`: row m of case c has owner c * `rows_per_case` + m."""
        if owners is None:
            owners = range(len(self.scripts) * self.rows_per_case)
        return EnumeratingNoise(
            self, list(owners), list(rounds or [0] * len(owners)), list(positions or [0] * len(owners))
        )


class EnumeratingNoise:
    """The oracle behind the `Noise` protocol: rows are independent choices, keys are used once, laws are float64 laws."""

    def __init__(self, scripts: Scripts, owners: list[int], rounds: list[int], positions: list[int]) -> None:
        self._scripts, self._owners, self._rounds, self._positions = scripts, owners, rounds, positions

    def select(self, rows: Seq[int]) -> EnumeratingNoise:
        parts = ([values[row] for row in rows] for values in (self._owners, self._rounds, self._positions))
        return EnumeratingNoise(self._scripts, *parts)

    def bernoulli(self, prob_B: Tensor, key: RoundKey, rows: Tensor) -> Tensor:
        if not isinstance(key, RoundKey):
            raise TypeError(f"coins are keyed by round, not by {key!r}")
        if prob_B.dtype != torch.float64 or prob_B.shape != rows.shape:
            raise NotALawError(f"coins have {prob_B.dtype} {tuple(prob_B.shape)} for {len(rows)} rows, not float64")
        probs = prob_B.tolist()
        if not all(0 <= p <= 1 for p in probs):
            raise NotALawError(f"a coin has a probability outside [0, 1]: {next(p for p in probs if not 0 <= p <= 1)}")
        tails = self._choose(key, rows, [[p, 1 - p] for p in probs])
        return torch.tensor(tails, dtype=torch.int64) == 0

    def categorical(self, probs_BV: Tensor, key: Key, rows: Tensor) -> Tensor:
        if probs_BV.dtype != torch.float64 or probs_BV.ndim != 2 or len(probs_BV) != len(rows):
            raise NotALawError(f"laws have {probs_BV.dtype} {tuple(probs_BV.shape)} for {len(rows)} rows, not float64")
        is_law = ((probs_BV >= 0).all(1)) & ((probs_BV.sum(1) - 1).abs() < 1e-9)
        if not bool(is_law.all()):
            raise NotALawError(f"{probs_BV[~is_law][0].tolist()} is no probability law")
        return torch.tensor(self._choose(key, rows, probs_BV.tolist()), dtype=torch.int64)

    def _choose(self, key: Key, rows: Tensor, weights: list[list[float]]) -> list[int]:
        indices: list[int] = []
        if isinstance(key, RoundKey):
            indices = [key.index] * len(rows) if isinstance(key.index, int) else key.index.tolist()
        outcomes = []
        for i, row in enumerate(rows.tolist()):
            case, member = divmod(self._owners[row], self._scripts.rows_per_case)
            name: tuple[object, ...]
            if isinstance(key, GumbelKey):
                name = ("gumbel", member, self._positions[row] + key.depth + 1)
                script = self._scripts.scripts[case]
                # Of more tokens than the geometry is made for, only a lone race can be enumerated: it is a plain draw.
                race = script.race if len(weights[i]) <= MAX_RUNNERS else script.choose
                outcomes.append(race(name, weights[i]))
                continue
            if isinstance(key, PositionKey):
                name = ("target", member, self._positions[row] + key.depth + 1)
            else:
                name = (key.purpose, member, self._rounds[row], indices[i])
            outcomes.append(self._scripts.scripts[case].choose(name, weights[i]))
        return outcomes


def enumerate_outcomes(
    run: Callable[[list[C], Scripts], list[R]],
    cases: Seq[C],
    rows_per_case: int = 1,
    max_batch: int = 4096,
    share: bool = False,
) -> list[list[tuple[float, R]]]:
    """Every result of each case with its probability, one entry per path through the choices.

    `run` computes the results of a list of cases with the noise of the given scripts; it is called with cases repeated.
    `share` lets a key serve several choices, which then see one uniform number (else KeyReusedError): what a forbidden
    reuse does to the law can so be measured.
    """
    outcomes: list[list[tuple[float, R]]] = [[] for _ in cases]
    pending: list[tuple[int, list[Choice]]] = [(case, []) for case in range(len(cases))]
    with _no_garbage_collection():
        while pending:
            batch, pending = pending[-max_batch:], pending[:-max_batch]
            scripts = Scripts((forced for _, forced in batch), rows_per_case, share)
            results = run([cases[case] for case, _ in batch], scripts)
            for (case, forced), script, result in zip(batch, scripts.scripts, results, strict=True):
                if len(script.made) < len(forced):
                    raise BatchDependentError(f"a replay ended after {len(script.made)} of {len(forced)} choices")
                outcomes[case].append((script.prob, result))
                pending += [(case, choices) for choices in script.alternatives]
    return outcomes


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """The many small objects here form no cycles, and looking for some takes twice as long as all the rest."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def law_of(outcomes: Iterable[tuple[float, R]]) -> dict[R, float]:
    """The law of the results: paths to the same result added up."""
    law: dict[R, float] = {}
    for prob, result in outcomes:
        law[result] = law.get(result, 0.0) + prob
    return law


def distance(one: dict[R, float], other: dict[R, float]) -> float:
    """The largest difference of two laws."""
    return max(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in {*one, *other})


def spans(tree: TokenTree, acceptance: Acceptance) -> list[TokenSpan]:
    """The tokens each row emits; checks that the accepted nodes are a path of the tree."""
    out = []
    tokens, parents = tree.tokens_BN.tolist(), tree.parents_BN.tolist()
    rows = zip(
        acceptance.path_BK.tolist(), acceptance.num_accepted_B.tolist(), acceptance.next_token_B.tolist(), strict=True
    )
    for row, (path, count, extra) in enumerate(rows):
        nodes = path[: count + 1]
        above = [parents[row][node] for node in nodes]
        assert above == [-1, *nodes[:-1]] and set(path[count + 1 :]) <= {-1}, f"{path} is no path of the tree"
        out.append((*(tokens[row][node] for node in nodes[1:]), extra))
    return out


def recorded_prob(tree: TokenTree, row: int) -> float:
    """The probability of a row's drawn tokens as the tree itself tells it: by draws, kinds and draft laws."""
    prob = 1.0
    left: dict[int, Tensor] = {}
    for draw, kind in zip(tree.draws_BM[row].tolist(), tree.kinds_BM[row].tolist(), strict=True):
        if draw < 0 or kind == DrawKind.FIXED:
            continue
        assert tree.draft_laws_BNV is not None
        parent, token = int(tree.parents_BN[row, draw]), int(tree.tokens_BN[row, draw])
        law = left.setdefault(parent, tree.draft_laws_BNV[row, parent].clone())
        prob *= float(law[token] / law.sum())
        if kind == DrawKind.WITHOUT_REPLACEMENT:
            law[token] = 0
    return prob


def product_law(one: dict[TokenSpan, float], other: dict[TokenSpan, float]) -> dict[tuple[TokenSpan, TokenSpan], float]:
    """The joint law of two independent rows."""
    return {(a, b): p * q for (a, p), (b, q) in itertools.product(one.items(), other.items())}
