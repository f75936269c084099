"""The average of two EAGLE heads: rows of the LM head go with their tokens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from specdec.drafters.heads import EagleConfig, EagleHead, MedusaConfig, MedusaHeads
from specdec.drafters.heads.formats import inspect_head, load_head, save_head
from specdec.drafters.heads.frequencies import FILE, read_frequencies, save_frequencies
from specdec.experiments.average_heads import averaged, main

SIZES = {
    "version": 3,
    "hidden_size": 8,
    "target_hidden_size": 8,
    "intermediate_size": 12,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_size": 4,
    "rms_norm_eps": 1e-6,
    "vocab_size": 20,
    "feature_layers": (0, 1, 2),
}


def make_head(seed: int, ids: list[int], **sizes: int) -> EagleHead:
    torch.manual_seed(seed)
    head = EagleHead(EagleConfig(**{**SIZES, "draft_vocab_size": len(ids), **sizes}))
    head.draft_to_target_R.copy_(torch.tensor(ids))
    return head


def test_rows_go_with_their_tokens() -> None:
    first, second = make_head(0, [1, 4, 9]), make_head(1, [1, 5, 9, 13])
    head = averaged(first, second, 0.25)
    assert head.config == second.config and torch.equal(head.draft_to_target_R, second.draft_to_target_R)
    one, other, found = first.state_dict(), second.state_dict(), head.state_dict()
    for name in found.keys() - {"lm_head.weight", "draft_to_target_R"}:
        torch.testing.assert_close(found[name], 0.75 * one[name] + 0.25 * other[name])
    rows = [0.75 * one["lm_head.weight"][at] if at >= 0 else None for at in (0, -1, 2, -1)]
    for row, known in enumerate(rows):
        alone = other["lm_head.weight"][row]
        torch.testing.assert_close(found["lm_head.weight"][row], alone if known is None else known + 0.25 * alone)
    # Neither is changed.
    assert torch.equal(first.fc.weight, one["fc.weight"]) and not torch.equal(head.fc.weight, second.fc.weight)


def test_a_wider_head_meets_what_it_began_as() -> None:
    first, second = make_head(0, [1, 4, 9]), make_head(1, [1, 4, 9], intermediate_size=20)
    head = averaged(first, second)
    one, other = first.midlayer.mlp, second.midlayer.mlp
    torch.testing.assert_close(
        head.midlayer.mlp.up_proj.weight[:12], (one.up_proj.weight + other.up_proj.weight[:12]) / 2
    )
    torch.testing.assert_close(head.midlayer.mlp.up_proj.weight[12:], other.up_proj.weight[12:])
    torch.testing.assert_close(head.midlayer.mlp.down_proj.weight[:, 12:], other.down_proj.weight[:, 12:] / 2)
    with pytest.raises(ValueError, match="heads of different shapes"):
        averaged(second, first)


def test_a_command_writes_it_with_what_lies_beside(tmp_path: Path) -> None:
    first, second = make_head(0, [1, 4, 9]), make_head(1, [1, 5, 9, 13])
    save_head(first.bfloat16(), tmp_path / "first", base_model="target")
    save_head(second.bfloat16(), tmp_path / "second", base_model="target")
    save_frequencies(torch.arange(20), tmp_path / "second")
    words = [str(tmp_path / name) for name in ("first", "second", "both")]
    main(*words)
    found = load_head(words[2])
    assert all(torch.equal(found.state_dict()[name], one) for name, one in averaged(first, second).state_dict().items())
    assert found.fc.weight.dtype == torch.bfloat16
    assert torch.equal(read_frequencies(f"{words[2]}/{FILE}", 20), torch.arange(20))
    assert "target" in str(inspect_head(words[2]))


def test_what_cannot_be_averaged_is_refused(tmp_path: Path) -> None:
    head = make_head(0, [1, 4, 9])
    with pytest.raises(ValueError, match="share=1"):
        averaged(head, head, 1)
    with pytest.raises(ValueError, match="different shapes"):
        averaged(head, make_head(1, [1, 4, 9], intermediate_size=8))
    save_head(MedusaHeads(MedusaConfig(8, 20, 2, has_own_lm_head=False)), tmp_path / "medusa")
    save_head(head, tmp_path / "eagle")
    words = [str(tmp_path / name) for name in ("eagle", "medusa", "out")]
    done = subprocess.run(
        [sys.executable, "-m", "specdec.experiments.average_heads", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "MedusaHeads" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
