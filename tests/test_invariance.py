"""numerics=invariant: in bfloat16 a token's bits depend on its own path alone, so speculative text is plain text."""

from __future__ import annotations

import functools
import json
import random

import pytest
import torch
from conftest import make_tiny, serves_invariant
from test_exactness import POLICIES, PROMPTS, SAMPLING
from test_model import ARCHITECTURES, Scenario
from torch import Tensor

from specdec.attention import UnsupportedModelError
from specdec.drafters import NGramDrafter, SmallModelDrafter
from specdec.engine import Engine
from specdec.invariance import make_invariant
from specdec.kernels.linear.onednn import OneDnnWeight
from specdec.loading import load_model
from specdec.model import PagedModel, Segment
from specdec.packing import PackedLinear
from specdec.pages import PagePool, PageTable
from specdec.sampling import SamplingParams
from specdec.verifiers import Verifier

pytestmark = pytest.mark.skipif(not serves_invariant(), reason="this CPU's bfloat16 products are not invariant")
SERVED = ["llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "olmo2", "gpt_neox", "gpt2", "opt"]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    return tmp_path


@functools.cache
def served(architecture: str = "llama") -> PagedModel:
    return make_model(architecture)


def make_model(
    architecture: str = "llama", seed: int = 0, noise: float = 0.0, numerics: str = "invariant"
) -> PagedModel:
    options = ARCHITECTURES.get(architecture, {})
    model = PagedModel(make_tiny(seed, noise, architecture, **options).bfloat16(), name=architecture)
    model.pack()
    if numerics == "invariant":
        make_invariant(model)
    return model


def token_by_token(model: PagedModel, paths: list[tuple[int, ...]]) -> Tensor:
    """The logits behind each path, one token per forward."""
    found: dict[tuple[int, ...], Tensor] = {}
    for path in sorted(set(paths), key=len, reverse=True):
        if path in found:
            continue
        pool = PagePool(-(-len(path) // 16), page_size=16)
        cache, table = model.new_cache(pool), PageTable(pool)
        table.reserve(len(path), 0)
        for at, token in enumerate(path):
            segment = Segment(table, at, torch.tensor([token]), torch.tensor([at]))
            found.setdefault(path[: at + 1], model.forward([segment], cache).logits_RV[0])
        cache.release()
    return torch.stack([found[path] for path in paths])


def differing(model: PagedModel, seed: int) -> tuple[int, int]:
    """Rows of random packed forwards whose bits are not those of plain decoding, and all of them."""
    lens = (58, 75) if (model.max_positions or 256) > 130 else (8, 14)
    scenario = Scenario(model, random.Random(seed), prompt_lens=lens, max_chunk=40)
    scenario.run(14)
    assert scenario.num_commits
    # The longest paths share their beginnings: the others cost nothing more.
    wanted = token_by_token(model, scenario.paths)
    return int((torch.cat(scenario.logits) != wanted).any(1).sum()), len(wanted)


@pytest.mark.parametrize("architecture", SERVED)
def test_a_token_has_the_same_bits_in_any_company(architecture):
    wrong, count = differing(served(architecture), seed=3)
    assert wrong == 0
    assert count > 50


def test_fast_numerics_differ():
    """What the test above would find."""
    assert differing(make_model(numerics="fast"), seed=3)[0] > 10


@pytest.mark.parametrize("policy", ["chain", "static", "top_k", "sampled"])
@pytest.mark.parametrize("drafter", ["ngram", "small_model"])
def test_speculative_equals_plain_in_bfloat16(drafter, policy):
    target, draft = served(), make_model(noise=0.03, numerics="fast")
    accepted = 0
    for name in ("greedy", "0.7", "everything"):
        plain = Engine(Verifier(target), max_batch_size=1).generate(PROMPTS, SAMPLING[name])
        one = NGramDrafter() if drafter == "ngram" else SmallModelDrafter(draft)
        engine = Engine(Verifier(target), one, POLICIES[policy](), max_batch_size=4, prefill_chunk=7, page_size=4)
        results = engine.generate(PROMPTS, SAMPLING[name])
        assert [r.token_ids for r in results] == [r.token_ids for r in plain], name
        accepted += sum(sum(r.metrics.accepted_by_depth) for r in results)
    assert accepted > (10 if drafter == "ngram" else 40)


def test_a_step_that_wants_no_logits():
    """A prompt goes on: none of its tokens is asked for."""
    prompt, params = [5 + i % 70 for i in range(90)], SamplingParams(max_new_tokens=8)
    whole = Engine(Verifier(served())).generate([prompt], params)
    pieces = Engine(Verifier(served()), NGramDrafter(), POLICIES["chain"](), prefill_chunk=11).generate(
        [prompt], params
    )
    assert pieces[0].token_ids == whole[0].token_ids


@pytest.mark.parametrize("drafter", ["ngram", "small_model"])
def test_shared_pages_and_preemption_change_no_bit(drafter):
    target, stem = served(), [5 + i % 70 for i in range(61)]
    prompts = [[*stem[:40], 7, i] for i in range(3)] + [stem, stem]
    params = SamplingParams(temperature=0.8, seed=3, max_new_tokens=40, ignore_eos=True)
    plain = Engine(Verifier(target), max_batch_size=1, share_prefixes=False).generate(prompts, params)
    one = NGramDrafter() if drafter == "ngram" else SmallModelDrafter(make_model(noise=0.03, numerics="fast"))
    options = {"max_batch_size": 3, "prefill_chunk": 17, "page_size": 4, "num_pages": 34}
    engine = Engine(Verifier(target), one, POLICIES["top_k"](), **options)
    for _ in range(2):
        assert [r.token_ids for r in engine.generate(prompts, params)] == [r.token_ids for r in plain]
    engine.check()
    assert engine.metrics.num_prefix_tokens > 100 and engine.metrics.num_preemptions > 0


@pytest.mark.parametrize(
    ("architecture", "message"),
    [("gemma2", "without softcap.*softcap 2.0"), ("float32", "is for bfloat16 on a CPU .*not for float32 on cpu")],
)
def test_a_model_that_cannot_be_served_so_is_refused_and_stays_fast(architecture, message):
    model = PagedModel(make_tiny()) if architecture == "float32" else make_model(architecture, numerics="fast")
    with pytest.raises(UnsupportedModelError, match=message):
        make_invariant(model)
    assert model.numerics == "fast"
    weights = [m.product.weight for m in model.model.modules() if isinstance(m, PackedLinear)]
    assert not any(one.is_invariant for one in weights if isinstance(one, OneDnnWeight))


@pytest.mark.parametrize("count", [1, 5, 16, 33])
def test_a_layer_that_rounds_by_the_number_of_rows_is_caught(count, monkeypatch):
    plain = PackedLinear.forward

    def forward(layer: PackedLinear, input: Tensor) -> Tensor:
        out = plain(layer, input)
        return out * 1.01 if input.shape[-2] == count else out

    monkeypatch.setattr(PackedLinear, "forward", forward)
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM is not invariant: .* use numerics=fast"):
        make_model()


def test_a_pass_is_remembered(cache_folder, monkeypatch):
    make_model()
    (record,) = cache_folder.rglob("*.json")
    assert json.loads(record.read_text())["class"] == "LlamaForCausalLM"
    monkeypatch.setattr("specdec.invariance._check", lambda model: pytest.fail("checked again"))
    assert make_model().numerics == "invariant"


def test_loading(tmp_path):
    make_tiny().bfloat16().save_pretrained(tmp_path / "model")
    path = str(tmp_path / "model")
    assert load_model(path).numerics == "invariant"
    assert load_model(path, numerics="fast").numerics == "fast"
    assert load_model(path, dtype="float32").numerics == "fast"
    assert load_model(path, packed=False).numerics == "fast"
    with pytest.raises(ValueError, match="numerics 'exact' is unknown; use auto, fast or invariant"):
        load_model(path, numerics="exact")
    with pytest.raises(ValueError, match="needs packed weights"):
        load_model(path, numerics="invariant", packed=False)
    with pytest.raises(UnsupportedModelError, match="not for float32"):
        load_model(path, numerics="invariant", dtype="float32")


@pytest.mark.real_model
def test_smollm2_says_the_same_in_bfloat16(embedded_bf16):
    prompts = [
        "Write a Python function that reverses a string.",
        "List three rivers and repeat the list.",
        "2 + 2 * 3 =",
    ]
    for temperature, count in ((0.0, 3), (0.8, 1)):
        params = SamplingParams(temperature=temperature, seed=4, max_new_tokens=32)
        plain = Engine(Verifier(embedded_bf16), max_batch_size=1).generate(prompts, params, chat=True)
        engine = Engine(Verifier(embedded_bf16), NGramDrafter(), POLICIES["top_k"](), max_batch_size=count)
        results = engine.generate(prompts, params, chat=True)
        assert [r.token_ids for r in results] == [r.token_ids for r in plain]
        assert sum(sum(r.metrics.accepted_by_depth) for r in results) > 3


@pytest.fixture(scope="module")
def embedded_bf16(tmp_path_factory) -> PagedModel:
    from specdec.loading import embedded_model_path

    return load_model(embedded_model_path(), dtype="bfloat16", numerics="invariant")
