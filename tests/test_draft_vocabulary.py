"""Heads that draft the most frequent tokens alone: laws over that part, texts as before, files that say what is frequent."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import test_learned_drafters as learned
import torch
from conftest import make_tiny
from head_cases import eagle_config, learn_eagle, learn_medusa
from safetensors.torch import save_file
from test_learned_drafters import PENALISED, POLICIES, PROMPTS, SAMPLING, WARM, drafted_error, engine_of, recorded
from torch import nn

from specdec import Engine, PagedModel, SamplingParams
from specdec.drafters import EagleDrafter, MedusaDrafter, Sampled, TopK, eagle, medusa
from specdec.drafters.heads import EagleHead, MedusaConfig, MedusaHeads
from specdec.drafters.heads.formats import save_head
from specdec.drafters.heads.frequencies import FILE, FrequentTokens, save_frequencies
from specdec.drafters.training.records import Record, RecordWriter
from specdec.drafters.vocabulary import drafting
from specdec.interfaces import Drafter
from specdec.packing import can_pack, linear_rows, pack_linears
from specdec.verifiers import Verifier

CPU = torch.device("cpu")
HEADS = ["medusa", "medusa_small", "eagle_1"]
SIZE = 40


@pytest.fixture(scope="module")
def target(tiny) -> PagedModel:
    return PagedModel(tiny(0), name="target")


@pytest.fixture(scope="module")
def texts(target) -> list[list[int]]:
    results = Engine(Verifier(target)).generate(PROMPTS, SAMPLING["greedy"])
    return [text for r in results if len(text := r.prompt_token_ids + r.token_ids) > 4]


@pytest.fixture(scope="module")
def counts(target, texts) -> torch.Tensor:
    return torch.bincount(torch.tensor([token for text in texts for token in text]), minlength=target.vocab_size)


@pytest.fixture(scope="module")
def inside(counts) -> torch.Tensor:
    """1 for the tokens that are drafted, 0 for all others."""
    order = sorted(range(len(counts)), key=lambda token: (-int(counts[token]), token))
    return torch.zeros(len(counts)).index_fill(0, torch.tensor(order[:SIZE]), 1.0)


@pytest.fixture(scope="module")
def drafters(target, texts, counts, tmp_path_factory) -> dict[str, Drafter]:
    tokens = FrequentTokens(save_frequencies(counts, tmp_path_factory.mktemp("head")), SIZE)
    own = learn_medusa(target, texts, steps=20)
    small = MedusaHeads.initial(MedusaConfig(target.hidden_size, target.vocab_size, 3, has_own_lm_head=False))
    return {
        "medusa": MedusaDrafter(own, tokens),
        "medusa_small": MedusaDrafter(small, tokens),
        "eagle_1": EagleDrafter(learn_eagle(target, eagle_config(target, 1), texts, steps=40), tokens),
    }


@pytest.mark.parametrize(
    ("policy", "rule", "params"), [("sampled", "traversal", WARM), ("mixed", "recursive", PENALISED)]
)
@pytest.mark.parametrize("name", HEADS)
def test_laws_are_the_network_s_over_the_part(
    target, drafters, inside, monkeypatch, name: str, policy: str, rule: str, params: SamplingParams
) -> None:
    whole = learned.dense_weights
    monkeypatch.setattr(learned, "dense_weights", lambda *of: whole(*of) * inside)
    assert drafted_error(drafters[name], target, policy, rule, params) < 1e-4


@pytest.mark.parametrize("name", HEADS)
def test_no_other_token_is_drafted_or_given_mass(target, drafters, inside, monkeypatch, name: str) -> None:
    proposals = recorded(drafters[name], monkeypatch)
    params = SamplingParams(temperature=1.0, seed=1, max_new_tokens=6)
    engine_of(target, drafters[name], Sampled([3, 2]), "traversal").generate(PROMPTS, params)
    for asked in proposals:
        tree = asked.tree
        assert bool(inside[tree.tokens_BN[:, 1:][tree.is_node_BN[:, 1:]]].all())
        assert tree.max_nodes == 1 or float((tree.draft_laws_BNV * (1 - inside)).abs().max()) == 0


@pytest.mark.parametrize(("name", "policy"), [("medusa", "top_k"), ("medusa_small", "coupled"), ("eagle_1", "mixed")])
def test_speculative_equals_plain(target, drafters, name: str, policy: str) -> None:
    accepted = 0
    for params in SAMPLING.values():
        plain = Engine(Verifier(target)).generate(PROMPTS, params)
        results = engine_of(target, drafters[name], POLICIES[policy]).generate(PROMPTS, params)
        assert [r.token_ids for r in results] == [r.token_ids for r in plain]
        accepted += sum(sum(r.metrics.accepted_by_depth) for r in results)
    assert accepted > 10


@pytest.mark.parametrize("kind", ["medusa", "eagle"])
def test_the_file_beside_a_head_is_found(target, counts, drafters, tmp_path: Path, kind: str) -> None:
    head = drafters["medusa"].heads if kind == "medusa" else drafters["eagle_1"].head
    load = {"medusa": medusa.load, "eagle": eagle.load}[kind]
    save_head(head, tmp_path / "head")
    with pytest.raises(ValueError, match=f"draft_vocab_size=9 needs .* has no {FILE}: name such a file"):
        load(str(tmp_path / "head"), draft_vocab_size=9)
    save_frequencies(counts, tmp_path / "head")
    wanted = counts.sort(descending=True, stable=True).indices[:9].sort().values
    for named in (None, str(tmp_path / "head" / FILE)):
        drafter = load(str(tmp_path / "head"), draft_vocab_size=9, token_frequencies=named)
        Engine(Verifier(target), drafter, TopK(4, 2, 2))
        part = drafting(head, target, drafter._tokens)
        assert torch.equal(part.ids_R, wanted)
    # Without the option the file is not looked at.
    assert load(str(tmp_path / "head"))._tokens is None


def test_training_data_are_counted(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path, {}, {})
    writer.commit([Record(torch.tensor([9, 9, 4, 4, 7]), torch.tensor([0, 0, 1, 1, 1]).bool(), 1)], {})
    writer.flush()
    assert FrequentTokens(tmp_path, 2).ids(12).tolist() == [4, 7]
    with pytest.raises(ValueError, match="holds token 7"):
        FrequentTokens(tmp_path, 2).ids(5)


def test_what_cannot_be_is_refused(target, counts, drafters, tmp_path: Path) -> None:
    file = save_frequencies(counts, tmp_path)
    save_file({"counts_V": torch.ones(3)}, tmp_path / "floats.safetensors")
    save_file({"other": torch.ones(3)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for name in ("other.safetensors", "broken.safetensors", "nowhere", "."):
        with pytest.raises(ValueError, match=f"neither a {FILE} nor a folder of `specdec data`"):
            FrequentTokens(tmp_path / name, 4)
    with pytest.raises(ValueError, match=r"counts \[3\] of torch.float32"):
        FrequentTokens(tmp_path / "floats.safetensors", 4)
    with pytest.raises(ValueError, match="draft_vocab_size=0"):
        FrequentTokens(file, 0)
    with pytest.raises(ValueError, match="counts 97 tokens, and the target has 98"):
        FrequentTokens(file, 4).ids(98)
    with pytest.raises(ValueError, match="draft_vocab_size=98 must be between 1 and the target's 97"):
        FrequentTokens(file, 98).ids(97)
    head = EagleHead(eagle_config(target, 3, draft_vocab_size=50))
    with pytest.raises(ValueError, match="a vocabulary of its own, of 50 tokens"):
        Engine(Verifier(target), EagleDrafter(head, FrequentTokens(file, 4)), TopK(4, 2, 2))
    with pytest.raises(ValueError, match="token_frequencies=x is of no use"):
        save_head(head, tmp_path / "head")
        eagle.load(str(tmp_path / "head"), token_frequencies="x")


def test_rows_of_packed_and_plain_layers_are_their_rows() -> None:
    ids = torch.tensor([0, 3, 4, 9])

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 10), nn.Linear(8, 12)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.one(hidden).sum() + self.two(hidden).sum()

    plain = Pair().bfloat16()
    layers = [plain]
    if can_pack(CPU, torch.bfloat16):
        packed, like = copy.deepcopy(plain), torch.zeros(1, 8, dtype=torch.bfloat16)
        with torch.inference_mode():
            assert pack_linears(packed, lambda: packed(like)) == 2
        layers.append(packed)
    for name in ("one", "two"):
        for pair in layers:
            rows = linear_rows(getattr(pair, name), ids)
            assert torch.equal(rows.weight, getattr(plain, name).weight[ids])
            assert torch.equal(rows.bias, getattr(plain, name).bias[ids])
    with pytest.raises(ValueError, match="type Embedding"):
        linear_rows(nn.Embedding(3, 4), ids)


@pytest.mark.skipif(not can_pack(CPU, torch.bfloat16), reason="weights are not packed on this CPU")
def test_a_packed_target_gives_its_rows(counts, drafters, tmp_path: Path) -> None:
    model = PagedModel(make_tiny(0).bfloat16())
    weight = model.model.get_output_embeddings().weight.clone()
    model.pack()
    tokens = FrequentTokens(save_frequencies(counts, tmp_path), SIZE)
    found = drafting(drafters["eagle_1"].head, model, tokens)
    hidden = torch.randn(5, model.hidden_size).bfloat16()
    wanted = (hidden.float() @ weight[found.ids_R].float().T).bfloat16()
    torch.testing.assert_close(found.lm_head(hidden), wanted)
