"""Evaluations of trainings that follow one another make one curve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specdec import cli
from specdec.experiments.learning_curve import learning_curve, trend


def write(path: Path, taus: dict[int, float | None]) -> Path:
    """Rows of a training with a learning step and an evaluation per number of tokens."""
    rows = []
    for step, (num_tokens, tau) in enumerate(taus.items()):
        measured = {} if tau is None else {"tau": tau, "accepted_1": 0.7, "accepted_2": 0.5}
        rows += [{"kind": "train", "step": step, "loss": 1.0}]
        rows += [{"kind": "eval", "step": step, "loss": 1.0, "num_tokens": num_tokens, **measured}]
    rows.append({"kind": "summary"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_tokens_of_trainings_add_up(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.jsonl", {1000: 2.0, 2000: 2.25}), write(tmp_path / "b.jsonl", {2000: 2.5, 6000: 2.75})]
    curve = learning_curve(files)
    assert [(one.training, one.num_tokens, one.tau) for one in curve] == [
        (0, 1000, 2.0),
        (0, 2000, 2.25),
        (1, 4000, 2.5),
        (1, 8000, 2.75),
    ]
    found = trend(curve)
    assert found.per_doubling == pytest.approx(0.25) and found.error == pytest.approx(0, abs=1e-9)
    assert found.tau(16000) == pytest.approx(3.0) and found.tokens(3.0) == pytest.approx(16000)


def test_the_command_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("a.jsonl"), {1000: 2.0, 2000: 2.2})
    write(Path("b.jsonl"), {2000: 2.5})
    assert cli.main(["learning_curve", "rows=[a.jsonl,b.jsonl]", "output=curve.png"]) == 0
    assert "3 evaluations" in capfd.readouterr().out and Path("curve.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("files", "part"),
    [
        (["few.jsonl"], "2 evaluations make no curve"),
        (["few.jsonl", "without.jsonl"], "without.jsonl holds no evaluation with tau"),
        (["nowhere.jsonl"], "no such file or folder: nowhere.jsonl"),
        ([], "rows is missing"),
    ],
)
def test_what_makes_no_curve_is_one_line(
    files: list[str], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("few.jsonl"), {1000: 2.0, 2000: 2.2})
    write(Path("without.jsonl"), {1000: None})
    words = [f"rows=[{','.join(files)}]"] if files else []
    assert cli.main(["learning_curve", *words, "output=curve.png"]) == 2
    said = capfd.readouterr().err
    assert part in said and said.strip().count("\n") == 0
