"""Draw tau against training tokens over the trainings of one head, each of which went on from what the one before gave."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from specdec.config import LearningCurveConfig
from specdec.experiments.train_report import places, training_rows


@dataclass(frozen=True)
class Evaluation:
    """One evaluation with tau: the training it belongs to, the tokens learnt from by then in all trainings, and its row."""

    training: int
    num_tokens: int
    row: dict[str, Any]

    @property
    def tau(self) -> float:
        return float(self.row["tau"])


@dataclass(frozen=True)
class Trend:
    """Tau = `at_one` + `per_doubling` x log2(tokens) by least squares; `error` is the standard error of `per_doubling`."""

    at_one: float
    per_doubling: float
    error: float

    def tau(self, num_tokens: float) -> float:
        return self.at_one + self.per_doubling * float(np.log2(num_tokens))

    def tokens(self, tau: float) -> float:
        """How many tokens that tau takes, should the trend go on."""
        return float(2 ** ((tau - self.at_one) / self.per_doubling))


def run(config: LearningCurveConfig, command: str) -> int:
    """Writes the picture to `output`, a PNG, and says how much a doubling of the tokens gave; raises ValueError for files
    without evaluations."""
    curve = learning_curve([Path(file) for file in config.rows])
    found = trend(curve)
    learning_curve_picture(curve, found, Path(config.output))
    print(
        f"{len(curve)} evaluations, {millions(curve[0].num_tokens)} to {millions(curve[-1].num_tokens)} tokens: tau "
        f"{curve[0].tau:.2f} to {curve[-1].tau:.2f}, {found.per_doubling:+.3f} +- {found.error:.3f} per doubling; "
        f"picture in {config.output}",
        flush=True,
    )
    return 0


def learning_curve(files: Seq[Path]) -> list[Evaluation]:
    """The evaluations of trainings that followed one another, whose tokens add up. Raises ValueError unless each file has
    evaluations with tau and there are three in all."""
    curve: list[Evaluation] = []
    for training, file in enumerate(files):
        evals = [row for row in training_rows(file)[1] if "tau" in row]
        if not evals:
            raise ValueError(f"rows: {file} holds no evaluation with tau; `specdec train` writes rows.jsonl with them")
        before = curve[-1].num_tokens if curve else 0
        curve += [Evaluation(training, before + row["num_tokens"], row) for row in evals]
    if len(curve) < 3:
        raise ValueError(f"rows={[str(file) for file in files]}: {len(curve)} evaluations make no curve, 3 do")
    return curve


def trend(curve: Seq[Evaluation]) -> Trend:
    doublings = np.log2([one.num_tokens for one in curve])
    taus = np.array([one.tau for one in curve])
    slope, at_one = np.polyfit(doublings, taus, 1)
    spread = ((taus - at_one - slope * doublings) ** 2).sum() / (len(curve) - 2)
    error = np.sqrt(spread / ((doublings - doublings.mean()) ** 2).sum())
    return Trend(float(at_one), float(slope), float(error))


def learning_curve_picture(curve: Seq[Evaluation], found: Trend, path: Path) -> None:
    """Tau with its trend, and below it how often each drafted place stayed, over the tokens on a logarithmic axis."""
    figure = Figure(figsize=(7, 6.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    tokens = [one.num_tokens for one in curve]
    line = f"trend: {found.per_doubling:+.2f} ± {found.error:.2f} per doubling"
    above.plot(tokens, [found.tau(x) for x in tokens], "--", color="0.5", linewidth=1, label=line)
    num_trainings = curve[-1].training + 1
    for training in range(num_trainings):
        own = [one for one in curve if one.training == training]
        label = "first training" if training == 0 else f"training {training + 1}, from there on"
        above.plot(
            [one.num_tokens for one in own],
            [one.tau for one in own],
            "o-",
            color=f"C{training}",
            markersize=5,
            label=label,
        )
    ends = [one for one, after in itertools.pairwise(curve) if after.training != one.training] + [curve[-1]]
    for one in (curve[0], *ends):
        above.annotate(
            f"{one.tau:.2f}", (one.num_tokens, one.tau), xytext=(-6, 5), textcoords="offset points", ha="right"
        )
    above.margins(y=0.1)
    above.set_ylabel("tau on held-out prompts")
    above.legend(loc="lower right", fontsize=9)
    num_places = max(len(places(one.row, "accepted")) for one in curve)
    for k in range(1, num_places + 1):
        own = [one for one in curve if f"accepted_{k}" in one.row]
        color = colormaps["viridis"]((k - 1) / max(num_places, 2) * 0.95)
        rates = [one.row[f"accepted_{k}"] for one in own]
        below.plot(
            [one.num_tokens for one in own], rates, "o-", color=color, linewidth=1.2, markersize=4, label=f"place {k}"
        )
    below.set_ylabel("share of drafted places that stayed")
    below.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=9, frameon=False)
    for panel in (above, below):
        panel.grid(alpha=0.3)
        for one in ends[:-1]:
            panel.axvline(one.num_tokens, color="0.5", linestyle=":", linewidth=1)
    _doublings(below, tokens)
    below.set_xlabel("training tokens, prompts included")
    figure.savefig(path, dpi=150)


def _doublings(panel: Axes, tokens: Seq[int]) -> None:
    """A logarithmic axis with a mark at each doubling: 0.25, 0.5, 1, 2, 4 million."""
    panel.set_xscale("log", base=2)
    marks = [2.0**k * 1e6 for k in range(-12, 20)]
    low, high = min(tokens) / 1.4, max(tokens) * 1.2
    panel.set_xlim(low, high)
    panel.xaxis.set_major_locator(FixedLocator([mark for mark in marks if low <= mark <= high]))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(lambda x, position: millions(x))


def millions(num_tokens: float) -> str:
    return f"{num_tokens / 1e6:.3g}M"


if __name__ == "__main__":
    from specdec.cli import main

    sys.exit(main(["learning_curve", *sys.argv[1:]]))
