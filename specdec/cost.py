"""What a step costs: seconds of the target's forward and of a draft as functions of their sizes, fitted and kept true."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Size = TypeVar("Size")


@dataclass(frozen=True)
class TargetSize:
    """What a forward of the target computes: packed tokens, sequences, and the tokens before them summed over sequences."""

    num_rows: int
    num_sequences: int = 1
    context: int = 0


@dataclass(frozen=True)
class DraftSize:
    """What drafting computes: levels one after another, nodes run on all of them, final tokens caught up with."""

    num_levels: int
    num_nodes: int
    num_caught_up: int = 0


@dataclass(frozen=True)
class TargetCost:
    """Seconds of a step without its draft: linear between the `knots` (numbers of rows), plus what further sequences, tokens
    before and (row, token before) pairs cost."""

    knots: tuple[float, ...]
    seconds: tuple[float, ...]
    per_sequence: float = 0.0
    per_context: float = 0.0
    per_pair: float = 0.0

    @staticmethod
    def fit(measured: Seq[tuple[TargetSize, float]]) -> TargetCost:
        """The least relative squares over all measurements with every coefficient >= 0, so more never costs less."""
        knots = tuple(sorted({size.num_rows for size, _ in measured}))

        def features(size: TargetSize) -> list[float]:
            return [1.0, *_steps(knots, size.num_rows), size.num_sequences - 1, size.context, _pairs(size)]

        first, *rest = _fit(measured, features, "step")
        curve = [first]
        for step in rest[:-3]:
            curve.append(curve[-1] + step)
        return TargetCost(knots, tuple(curve), *rest[-3:])

    def predict(self, num_rows: float, num_sequences: int, context: int) -> float:
        """Seconds of a step as they were calibrated."""
        rows = np.array(num_rows, dtype=float)
        seconds = np.interp(rows, self.knots, self.seconds) + self.besides_rows(rows, num_sequences, context)
        return float(seconds)

    def besides_rows(self, rows_C: Array, num_sequences: int, context: int) -> Array:
        """Seconds [C] beyond those of the curve."""
        mean = context / max(num_sequences, 1)
        extra = self.per_sequence * (num_sequences - 1) + self.per_context * context
        return extra + self.per_pair * mean * rows_C


@dataclass(frozen=True)
class DraftCost:
    """Seconds of drafting anything at all, and per level, node run and token caught up with."""

    fixed: float
    per_level: float = 0.0
    per_node: float = 0.0
    per_caught_up: float = 0.0

    @staticmethod
    def fit(measured: Seq[tuple[DraftSize, float]]) -> DraftCost:
        def features(size: DraftSize) -> list[float]:
            return [1.0, size.num_levels, size.num_nodes, size.num_caught_up]

        return DraftCost(*_fit(measured, features, "draft"))

    def predict(self, levels_C: Array, nodes_C: Array, caught_up_C: Array) -> Array:
        """Seconds [C]; nothing where no level is drafted."""
        seconds = self.fixed + self.per_level * levels_C + self.per_node * nodes_C + self.per_caught_up * caught_up_C
        return seconds * (levels_C > 0)


class CostModel:
    """Calibrated costs, corrected by what steps are seen to take.

    Three corrections, all factors: one for the machine as it runs now, one per knot of the target's curve (acceptance and
    bookkeeping, which calibration may not see, grow with the tree), one for drafts against the target. The first moves
    fast, the others slowly once they have seen a few steps; no single step moves one by more than a moderate error.
    """

    _CLIP = 0.5
    _DRIFT, _SLOWEST = 0.1, 0.05

    def __init__(self, target: TargetCost, draft: DraftCost) -> None:
        self.target, self.draft = target, draft
        self._drift = self._draft_bend = 0.0
        self._bend_K, self._seen_K = np.zeros((2, len(target.knots)))
        self._num_drafts = 0
        self._curve = self._bent()

    def step_s(self, rows: Array, num_sequences: int, context: int) -> Array:
        """Seconds of a step without its draft, for each number of rows; beyond the last knot the line goes on."""
        seconds: Array = np.interp(rows, *self._curve)
        return (seconds + self.target.besides_rows(rows, num_sequences, context)) * math.exp(self._drift)

    def draft_s(self, levels: Array, nodes: Array, caught_up: Array) -> Array:
        """Seconds of drafting."""
        return self.draft.predict(levels, nodes, caught_up) * math.exp(self._drift + self._draft_bend)

    def observe_step(self, size: TargetSize, seconds: float) -> None:
        """A step of this size took `seconds` beside its draft."""
        rows = np.array(size.num_rows, dtype=float)
        error = self._error(seconds, float(self.step_s(rows, size.num_sequences, size.context)))
        self._drift += self._DRIFT * error
        weight_K = np.array(_hats(self.target.knots, size.num_rows))
        self._seen_K += weight_K
        self._bend_K += np.maximum(0.5 / (1 + np.maximum(self._seen_K, 1)), self._SLOWEST) * weight_K * error
        self._curve = self._bent()

    def observe_draft(self, size: DraftSize, seconds: float) -> None:
        """A draft of this size took `seconds`."""
        sizes = (np.array(n, dtype=float) for n in (size.num_levels, size.num_nodes, size.num_caught_up))
        self._num_drafts += 1
        step = max(0.5 / (1 + self._num_drafts), self._SLOWEST)
        self._draft_bend += step * self._error(seconds, float(self.draft_s(*sizes)))

    def _bent(self) -> tuple[Array, Array]:
        """The curve as it is seen now, with a last knot so far out that no step lies beyond it."""
        knots = np.array(self.target.knots, dtype=float)
        seconds = np.array(self.target.seconds) * np.exp(self._bend_K)
        # Of a single size nothing is known about another: costs are taken to be constant.
        slope = (seconds[-1] - seconds[-2]) / (knots[-1] - knots[-2]) if len(knots) > 1 else 0.0
        far = 1e6
        return np.append(knots, knots[-1] + far), np.append(seconds, seconds[-1] + max(slope, 0.0) * far)

    def _error(self, seconds: float, predicted: float) -> float:
        """How far the logarithm is off; a pause of the machine counts as no more than a moderate error."""
        if seconds <= 0 or predicted <= 0:
            return 0.0
        return min(max(math.log(seconds / predicted), -self._CLIP), self._CLIP)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The calibrated costs, without what was seen since, as JSON takes them."""
        return {"target": asdict(self.target), "draft": asdict(self.draft)}

    @staticmethod
    def from_dict(read: dict[str, dict[str, Any]]) -> CostModel:
        """Raises ValueError for what `to_dict` did not make."""
        try:
            curve = {
                key: tuple(map(float, value)) if isinstance(value, (list, tuple)) else float(value)
                for key, value in read["target"].items()
            }
            draft = {key: float(value) for key, value in read["draft"].items()}
            return CostModel(TargetCost(**curve), DraftCost(**draft))  # type: ignore[arg-type]
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise ValueError(f"no cost model: {error!r}") from error


def _steps(knots: Seq[float], rows: int) -> list[float]:
    """How far each interval between knots is passed at `rows`, from 0 to 1."""
    return [min(max((rows - a) / (b - a), 0.0), 1.0) for a, b in itertools.pairwise(knots)]


def _hats(knots: Seq[float], rows: int) -> list[float]:
    """The weight of each knot in the interpolation at `rows`."""
    steps = [1.0, *_steps(knots, rows), 0.0]
    return [steps[i] - steps[i + 1] for i in range(len(knots))]


def _pairs(size: TargetSize) -> float:
    return size.num_rows * size.context / max(size.num_sequences, 1)


def _fit(measured: Seq[tuple[Size, float]], features: Callable[[Size], list[float]], what: str) -> list[float]:
    """Coefficients >= 0 of the features with the least squares of relative errors. Raises ValueError for no measurements."""
    if not measured:
        raise ValueError(f"no {what} was measured: a cost model needs at least one")
    return _non_negative_fit([features(size) for size, _ in measured], [seconds for _, seconds in measured])


def _non_negative_fit(features: Seq[Seq[float]], seconds: Seq[float], sweeps: int = 3000) -> list[float]:
    """argmin of the squared relative errors over coefficients >= 0, by coordinate descent."""
    a = np.array([[one / s for one in row] for row, s in zip(features, seconds, strict=True)])
    scale = np.maximum(np.abs(a).max(0), 1e-300)
    a = a / scale
    gram, wanted = (a.T @ a).tolist(), a.sum(0).tolist()
    x = [0.0] * len(wanted)
    for _ in range(sweeps):
        for i, row in enumerate(gram):
            if row[i] > 0:
                rest = sum(g * v for g, v in zip(row, x, strict=True)) - row[i] * x[i]
                x[i] = max((wanted[i] - rest) / row[i], 0.0)
    return [value / s for value, s in zip(x, scale.tolist(), strict=True)]
