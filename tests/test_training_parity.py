"""What a head sees in training is what it sees when it is served, and several processes train as one does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor
from train_in_processes import train

from specdec.drafters.growth import DraftRound, Grown
from specdec.drafters.training.attention import packed_attention
from specdec.drafters.training.initial import new_eagle, new_medusa
from specdec.drafters.training.objectives import Eagle3Objective
from specdec.drafters.training.records import Record
from specdec.drafters.training.rows import Row
from specdec.drafters.training.target import TrainingTarget
from specdec.engine import Engine
from specdec.experiments.tau import drafter_of
from specdec.interfaces import Noise
from specdec.model import PagedModel
from specdec.sampling import SamplingParams
from specdec.tree import DrawKind, TokenTree, TreeSpec
from specdec.verifiers import Verifier

ROOT = Path(__file__).resolve().parent.parent
DEPTH = 3


class Listener:
    """A policy that grows a chain along given texts and notes the draft's laws on the way; the tree it hands over is a root
    alone, so every token of a text becomes a root."""

    spec = TreeSpec(frozenset({DrawKind.FIXED}), is_chain=True)
    max_depth, max_nodes, max_expanded = DEPTH, DEPTH + 1, DEPTH

    def __init__(self, texts: list[list[int]]) -> None:
        self._texts = texts
        self.laws: dict[tuple[int, int, int], Tensor] = {}

    def grow(self, draft: DraftRound, noise: Noise) -> Grown:
        rows = [(next(i for i, text in enumerate(self._texts) if one.token_ids == text[: len(one.token_ids)]), one)
                for one in draft.sequences]  # fmt: skip
        following = draft.expand_root()
        for depth in range(max(draft.limits)):
            tokens_BWk, logs_BWk = following.top(draft.vocab_size)
            laws = torch.full((len(rows), draft.vocab_size), -torch.inf).scatter(1, tokens_BWk[:, 0], logs_BWk[:, 0])
            for row, (text, one) in enumerate(rows):
                if depth < draft.limits[row]:
                    self.laws[text, one.root_position, depth] = laws[row]
            if depth + 1 < max(draft.limits):
                places = [(self._texts[text], one.root_position + depth + 1) for text, one in rows]
                next_B1 = torch.tensor([[text[min(at, len(text) - 1)]] for text, at in places])
                following = draft.expand(next_B1, torch.full_like(next_B1, depth), depth + 1)
        return Grown(TokenTree.roots(draft.roots_B, draft.vocab_size), torch.zeros(len(rows), 1, dtype=torch.int64))


@pytest.mark.parametrize("kind", ["medusa", "eagle1", "eagle3", "eagle3_reduced"])
def test_training_sees_what_serving_computes(kind: str, tiny) -> None:
    target = TrainingTarget(PagedModel(tiny()))
    prompts = [[5, 9, 33, 4, 7], [60, 8, 2, 44], [11, 12, 13, 14, 15, 16, 17, 18, 19]]
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    plain = Engine(Verifier(target.model)).generate(prompts, params)
    texts = [one.prompt_token_ids + one.token_ids for one in plain]
    head, laws = _head_and_laws(kind, target, texts)
    listener = Listener(texts)
    engine = Engine(Verifier(target.model), drafter_of(head), listener, page_size=4, prefill_chunk=3)
    served = engine.generate(prompts, params)
    assert [one.token_ids for one in served] == [one.token_ids for one in plain]
    compared = 0
    for (text, root, depth), law_V in listener.laws.items():
        if root + depth + 1 < len(texts[text]):
            # Training speaks of the token before the root.
            torch.testing.assert_close(laws(text, root - 1, depth), law_V, rtol=1e-4, atol=1e-4)
            compared += 1
    assert compared > 60


def _head_and_laws(kind: str, target: TrainingTarget, texts: list[list[int]]):
    """A head with random weights, and the log-laws [V] that training computes: by text, token and depth."""
    row = Row.of(
        [Record(torch.tensor(text), torch.ones(len(text), dtype=torch.bool), i) for i, text in enumerate(texts)]
    )
    starts = [sum(row.lengths[:i]) for i in range(len(texts))]
    states = target([], row, range(3))
    if kind == "medusa":
        head = new_medusa(target, DEPTH)
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        logits_KTV = head.logits(states[2])
        return head, lambda text, token, depth: logits_KTV[depth, starts[text] + token].log_softmax(-1)
    ids = torch.arange(10, 70) if kind == "eagle3_reduced" else None
    version = 1 if kind == "eagle1" else 3
    head = new_eagle(target, version, 0, ids, (2,) if version == 1 else (0, 1, 2))
    if version == 1:

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return packed_attention(query, key, value, row.lengths)

        out_TD = head(target.embed(row.ahead(1)), head.fuse([states[2]]), row.positions_T, attend)
        first_TV = head.logits(out_TD, target.lm_head)

        def one_step(text: int, token: int, depth: int) -> Tensor:
            if depth == 0:
                return first_TV[starts[text] + token].log_softmax(-1)
            return _chained(head, target, texts[text], states, starts[text], token, depth)

        return head, one_step
    objective = Eagle3Objective(head, target, num_steps=DEPTH)
    # Also tokens outside the reduced vocabulary go on here.
    objective._is_drafted_V = None
    steps = objective.unroll(row, states)

    def unrolled(text: int, token: int, depth: int) -> Tensor:
        hidden_MD, tokens_M = steps[depth]
        (place,) = (tokens_M == starts[text] + token).nonzero()
        logits_R = head.logits(hidden_MD[place])[0]
        law_V = torch.full((target.vocab_size,), -torch.inf)
        law_V[slice(None) if ids is None else ids] = logits_R.log_softmax(-1)
        return law_V

    return head, unrolled


def _chained(head, target, text, states, start, token, depth) -> Tensor:
    """EAGLE-1 drafts on its own features though it is trained on one step alone: the later steps, recomputed whole."""
    features = states[2][start : start + token + 1]
    tokens = torch.tensor(text)
    for k in range(depth + 1):
        length = len(features)

        def attend(query: Tensor, key: Tensor, value: Tensor, length: int = length) -> Tensor:
            return packed_attention(query, key, value, [length])

        out = head(target.embed(tokens[1 : length + 1]), features, torch.arange(length), attend)
        # The drafted feature of the token after the last stands in for the target's.
        features = torch.cat([features, out[-1:]])
        assert length == token + 1 + k
    return head.logits(out[-1:], target.lm_head)[0].log_softmax(-1)


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """The same two rows per step, in one process or shared by two over gloo, give the same weights."""
    script = ROOT / "tests" / "train_in_processes.py"
    both = subprocess.run([sys.executable, script, tmp_path / "two", "2"], capture_output=True, text=True, cwd=ROOT)
    assert both.returncode == 0, both.stderr
    (tmp_path / "one").mkdir()
    train(0, 1, tmp_path / "one", 0)
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()
    for kind in ("medusa", "eagle1", "eagle3"):
        one, two = (torch.load(tmp_path / folder / f"{kind}.pt") for folder in ("one", "two"))
        assert one["rows"].keys() == two["rows"].keys()
        for name, value in one["rows"].items():
            assert two["rows"][name] == pytest.approx(value, rel=1e-4), name
        for name, weight in one["weights"].items():
            torch.testing.assert_close(two["weights"][name], weight, rtol=1e-4, atol=1e-6)
