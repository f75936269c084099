"""Why accepted paths end: counted by hand, and by the command on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from head_cases import save_target_and_head

from specdec import cli
from specdec.experiments.endings import Ending, Endings

TEXTS = [" the", "re", "\n", "12", ".", " cat"]


def test_every_forward_ends_for_one_reason() -> None:
    found = Endings(TEXTS, frozenset({0, 1, 2, 3, 4}), max_depth=2)
    token_ids = [0, 1, 2, 3, 5, 4, 0, 1, 0, 3]
    endings = [
        Ending(0, 1, True),  # 0: the prompt's forward
        Ending(1, 9, False),  # 1, then 2: the tree had other children
        Ending(1, 9, True),  # 3, then 5: not in the vocabulary, whatever the tree had
        Ending(0, 9, False),  # 4: wrong at once
        Ending(2, 9, True),  # 0 1, then 0: as deep as it may be
        Ending(0, 9, False),  # 3
        Ending(3, 9, True),  # behind the end
    ]
    found.add(token_ids, endings)
    fields = found.fields(num_target_forwards=6)
    assert fields["ends"] == {"undrafted": 1, "uncovered": 1, "deepest": 1, "leaf": 0, "wrong": 3}
    assert fields["covered"] == pytest.approx(0.9) and fields["draft_vocab_size"] == 5
    assert fields["tau_if_covered"] == 2.0
    assert fields["kinds"] == {
        "after a newline": {"tokens": 1, "missed": 0, "uncovered": 0},
        "number": {"tokens": 1, "missed": 1, "uncovered": 0},
        "punctuation": {"tokens": 2, "missed": 2, "uncovered": 0},
        "word": {"tokens": 4, "missed": 1, "uncovered": 1},
        "inside a word": {"tokens": 2, "missed": 0, "uncovered": 0},
    }


def test_a_leaf_above_the_deepest_level_is_the_trees_own_end() -> None:
    found = Endings(TEXTS, None, max_depth=3)
    found.add([0, 1], [Ending(1, 4, True)])
    assert found.fields(1)["ends"]["leaf"] == 1 and found.fields(1)["covered"] == 1


@pytest.fixture
def words(tiny, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    save_target_and_head(tiny, tokenizer)
    Path("prompts.txt").write_text("abcabc\nthe cat\n")
    return ["limits", "target=hf", "target.path=target", "prompt_file=prompts.txt", "sampling.max_new_tokens=12"]


def test_a_row_per_policy(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    policies = "policies=['drafter/policy=chain drafter.policy.depth=2','drafter/policy=top_k drafter.policy.total=8']"
    assert cli.main([*words, "draft=head", "output=rows.jsonl", policies]) == 0
    assert "2 rows in rows.jsonl" in capfd.readouterr().out
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert [row["policy"].partition("(")[0] for row in rows] == ["chain", "top_k"]
    for row in rows:
        assert (
            row["same_text_as_plain"] == 1
            and row["draft_vocab_size"] == 40
            and row["command"].startswith("specdec limits ")
        )
        assert sum(row["ends"].values()) == row["num_target_forwards"]
        assert sum(kind["tokens"] for kind in row["kinds"].values()) == row["new_tokens"]
        assert row["tau_if_covered"] >= row["tau"] >= 1


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["draft=head", "drafter=medusa"], "drafter=medusa: this is for an EAGLE head"),
        (["draft=head", "drafter.draft_vocab_size=8"], "this is for an EAGLE head as it was trained"),
        ([], "give draft="),
        (["draft=head", "sampling.temperature=1"], "the target's own text is the greedy one"),
        (["draft=head", "policies=[]"], "policies must name at least one"),
        (["draft=head", "policies=['drafter=ngram']"], "drafter=ngram is no part of a policy"),
        (["draft=head", "prompt_file=null"], "prompt_file is missing"),
    ],
)
def test_what_it_is_not_for_is_one_line(more: list[str], part: str, words: list[str], capfd) -> None:
    assert cli.main([*words, *more, "output=rows.jsonl"]) == 2
    said = capfd.readouterr().err
    assert part in said and said.strip().count("\n") == 0
