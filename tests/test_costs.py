"""What steps cost: every size has its row, timers run in turns, each weight is counted once, and the start is timed twice."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from head_cases import save_target_and_head
from torch import nn

from specdec import cli
from specdec.experiments.cost_measures import forward_costs, linear_layers
from specdec.experiments.gpu_measures import in_turns
from specdec.kernels.linear import can_pack
from specdec.model import PagedModel


@pytest.fixture
def words(tiny, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    save_target_and_head(tiny, tokenizer)
    return ["costs", "target=hf", "target.path=target", "repeats=1", "contexts=[8,1000,16]", "num_nodes=[2,1]"]


def test_a_row_per_size_and_level(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    more = ["draft=head", "drafter.policy.depth=3", "drafter.policy.k=2", "startup=false", "output=rows.jsonl"]
    assert cli.main([*words, *more]) == 0
    said = capfd.readouterr()
    assert "10 rows in rows.jsonl, picture in rows.png" in said.out and "context 1000 is longer than target" in said.err
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert Path("rows.png").stat().st_size > 1000
    for context, some in zip((8, 16), (rows[:5], rows[5:]), strict=True):
        assert [row["context"] for row in some] == [context] * 5
        assert [row["num_nodes"] for row in some[:2]] == [2, 1] and [row["num_levels"] for row in some[2:]] == [1, 2, 3]
        first = some[0]
        for row in some:
            assert row["ratio"] == row["seconds"] / first["seconds"] > 0
            assert row["command"].startswith("specdec costs ") and row["experiment"] == "costs"
        assert first["ratio"] == 1 and first["linear_s"] > 0 and first["weight_bytes"] > 0
        assert "eagle(head)" in some[2]["drafter"] and "top_k" in some[2]["policy"]


def test_a_start_finds_what_the_one_before_has_kept(words: list[str]) -> None:
    own = os.environ.get("SPECDEC_CACHE")
    more = ["drafter=ngram", "engine.speculation=adaptive", "contexts=[8]", "num_nodes=[1]", "output=rows.jsonl"]
    assert cli.main([*words, *more]) == 0
    assert os.environ.get("SPECDEC_CACHE") == own
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    cold, warm = (row for row in rows if row["measure"] == "startup")
    assert (cold["cached"], warm["cached"]) == (False, True)
    for row in (cold, warm):
        assert row["seconds"] == pytest.approx(
            sum(row[f"{part}_s"] for part in ("import", "load", "setup", "first_token"))
        )
    assert cold["num_cached"] == 0 < warm["num_cached"]


def test_timers_take_turns() -> None:
    order: list[str] = []
    found = in_turns([lambda: order.append("a"), lambda: order.append("b")], torch.device("cpu"), 2)
    assert len(found) == 2 and order == ["a", "b"] * (len(order) // 2)


@pytest.mark.parametrize("packed", [False, True])
def test_each_weight_counts_once(tiny, packed: bool) -> None:
    model = tiny(dtype=torch.bfloat16) if packed else tiny()
    want = sum(one.weight.numel() * one.weight.element_size() for one in model.modules() if isinstance(one, nn.Linear))
    target = PagedModel(model)
    if packed:
        if not can_pack(target.device, target.dtype):
            pytest.skip("nothing is packed here")
        target.pack()
    layers = linear_layers(target.model)
    assert sum(size for _, _, size in layers) == want
    first, second = forward_costs(target, 8, [1, 3], 1, False)
    assert first["num_nodes"] == 1 and second["num_nodes"] == 3 and first["weight_bytes"] == want


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["draft=head", "num_nodes=[0]"], "must be >= 1"),
        (["draft=head", "contexts=[]"], "must be >= 1"),
        (["draft=head", "repeats=0"], "repeats=0"),
        ([], "give draft="),
        (["draft=head", "rule=rejection"], "rule=rejection is not exact"),
    ],
)
def test_what_cannot_be_measured_is_one_line(more: list[str], part: str, words: list[str], capfd) -> None:
    assert cli.main([*words, *more, "output=rows.jsonl"]) == 2
    said = capfd.readouterr().err
    assert part in said and said.strip().count("\n") == 0
