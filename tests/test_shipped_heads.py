"""The heads that come with the project: found by name, sound, lossless, and better than no drafts."""

from __future__ import annotations

from pathlib import Path

import pytest

from specdec.checkpoint import shipped_heads
from specdec.config import compose, to_typed
from specdec.drafters.heads.formats import inspect_head
from specdec.experiments.system import load_system, load_target, plain_system
from specdec.sampling import SamplingParams

FOLDER = Path(__file__).parents[1] / "heads"
KINDS = {"eagle1": "eagle", "eagle3": "eagle", "medusa": "medusa"}
PROMPTS = ["def is_prime(n):", "What is the capital of France?"]


def test_every_head_has_a_card_and_is_small() -> None:
    assert shipped_heads() == sorted(KINDS)
    for name in shipped_heads():
        card = (FOLDER / name / "README.md").read_text()
        assert all(word in card for word in ("specdec train", "specdec data", "tau", "Apache-2.0"))
    assert sum(file.stat().st_size for file in FOLDER.rglob("*")) < 60e6


@pytest.mark.parametrize("name", sorted(KINDS))
def test_heads_are_sound(name: str) -> None:
    report = inspect_head(name)
    assert report.is_sound, report


@pytest.mark.real_model
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", sorted(KINDS))
def test_heads_change_no_text_and_save_forwards(name: str, temperature: float) -> None:
    config = to_typed(
        compose(
            "generate",
            [
                f"drafter={KINDS[name]}",
                f"draft={name}",
                "target.dtype=float32",
                "engine.speculation=fixed",
                "output=rows.jsonl",
            ],
        )
    )
    target, params = load_target(config.target), SamplingParams(temperature=temperature, seed=3, max_new_tokens=24)
    plain = plain_system().engine(target, config.engine).generate(PROMPTS, params, chat=True)
    found = load_system(config).engine(target, config.engine).generate(PROMPTS, params, chat=True)
    assert [one.token_ids for one in found] == [one.token_ids for one in plain]
    assert sum(one.metrics.num_target_forwards for one in found) < 0.9 * sum(
        one.metrics.num_new_tokens for one in found
    )
