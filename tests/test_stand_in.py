"""Stand-ins say what the small model says, at every layer and token by token, and refuse what they cannot be."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from conftest import VOCAB_SIZE, make_tiny
from head_cases import attend_within, eagle_config

from specdec import config as configs
from specdec.drafters import NGramDrafter, TopK
from specdec.drafters.eagle import load as load_eagle
from specdec.drafters.heads import EagleHead, MedusaConfig, MedusaHeads
from specdec.drafters.heads.formats import save_head
from specdec.drafters.heads.wide import widen_eagle
from specdec.drafters.medusa import load as load_medusa
from specdec.engine import Engine
from specdec.experiments.system import load_target, target_labels
from specdec.model import PagedModel
from specdec.sampling import SamplingParams
from specdec.selfcheck import self_check
from specdec.stand_in import ModelShape, StandIn, load_stand_in, widen
from specdec.verifiers import Verifier

SHAPE = ModelShape(
    hidden_size=96,
    intermediate_size=100,
    num_layers=4,
    num_heads=12,
    num_kv_heads=4,
    head_size=16,
    vocab_size=VOCAB_SIZE + 30,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
BASES = {
    "llama": {},
    "llama3 angles": {"rope_parameters": LLAMA3},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "odd groups": {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48},
    "qwen2": {"architecture": "qwen2"},
    "mistral": {"architecture": "mistral", "sliding_window": None},
}


def states(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    with torch.no_grad():
        out = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    return out.logits, out.hidden_states


@pytest.mark.parametrize("name", BASES)
def test_logits_and_hidden_states_are_those_of_the_small_model(name):
    base = make_tiny(**BASES[name])
    before = torch.random.get_rng_state()
    wide = widen(base, SHAPE)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert ModelShape.of(wide) == SHAPE
    # Late positions too: a frequency that is slightly off shows there.
    ids = torch.randint(3, VOCAB_SIZE, (2, 200), generator=torch.Generator().manual_seed(1))
    logits, hidden = states(base, ids)
    found, wide_hidden = states(wide, ids)
    torch.testing.assert_close(found[..., :VOCAB_SIZE], logits, atol=1e-4, rtol=1e-4)
    assert found[..., VOCAB_SIZE:].max() < found[..., :VOCAB_SIZE].min() - 1e4
    assert found.isfinite().all()
    size, last = base.config.hidden_size, base.config.num_hidden_layers
    moved = {**{i: i for i in range(last)}, last: SHAPE.num_layers}
    for layer, at in moved.items():
        torch.testing.assert_close(wide_hidden[at][..., :size], hidden[layer], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_added_tokens_are_impossible_in_half_precision(dtype):
    wide = widen(make_tiny(), SHAPE, dtype)
    logits, _ = states(wide, torch.arange(3, 60)[None])
    laws = logits.float().softmax(-1)
    assert (laws[..., VOCAB_SIZE:] == 0).all()
    torch.testing.assert_close(laws.sum(-1), torch.ones(1, 57))


def test_as_large_as_it_is_it_is_the_same():
    base = make_tiny()
    shape = ModelShape.of(base)
    ids = torch.arange(3, 60)[None]
    torch.testing.assert_close(states(widen(base, shape), ids)[0], states(base, ids)[0])
    deeper = replace(shape, num_layers=3, intermediate_size=64)
    torch.testing.assert_close(states(widen(base, deeper), ids)[0], states(base, ids)[0])


def test_what_is_ignored_is_no_zeros():
    """Products of zeros cost less power than real ones, which would flatter the timings."""
    wide = widen(make_tiny(), SHAPE)
    layers = wide.model.layers
    for layer in layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
            assert (part.weight == 0).float().mean() < 0.01
    for layer in layers[2:]:
        assert not layer.self_attn.o_proj.weight.any()
        assert not layer.mlp.down_proj.weight.any()


def test_it_runs_over_pages_and_says_the_same_text():
    base = make_tiny()
    wide = PagedModel(widen(base, SHAPE), name="stand-in")
    self_check(wide)
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    prompts = [[5, 6, 7, 5, 6, 7, 5], list(range(3, 30))]
    wanted = [one.token_ids for one in Engine(Verifier(PagedModel(base))).generate(prompts, params)]
    engine = Engine(Verifier(wide), NGramDrafter(), TopK(total=8, depth=4, k=2))
    assert [one.token_ids for one in engine.generate(prompts, params)] == wanted
    sampled = replace(params, temperature=1.0, seed=3)
    plain = Engine(Verifier(PagedModel(base))).generate(prompts, sampled)
    assert [one.token_ids for one in engine.generate(prompts, sampled)] == [one.token_ids for one in plain]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"hidden_size": 24}, "hidden_size=24 is less than the small model's 32"),
        ({"num_layers": 1}, "num_layers=1 is less"),
        ({"num_heads": 4}, "num_heads=4 over num_kv_heads=4 gives each of them fewer heads than the small model's 2"),
        ({"num_heads": 9}, "num_heads=9 must be a multiple of num_kv_heads=4"),
        ({"hidden_size": 32, "num_heads": 16}, "vocab_size=127 adds tokens, which takes a spare dimension"),
    ],
)
def test_a_shape_without_room_is_refused(changes, found):
    with pytest.raises(ValueError, match=found):
        widen(make_tiny(), replace(SHAPE, **changes))


@pytest.mark.parametrize(
    ("architecture", "options", "found"),
    [
        ("gpt_neox", {}, "it is a gpt_neox model; widened are llama, mistral, qwen2"),
        ("mistral", {"sliding_window": 6}, "a sliding window of 6"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope types default",
        ),
    ],
)
def test_other_models_are_refused(architecture, options, found):
    with pytest.raises(ValueError, match=found):
        widen(make_tiny(architecture=architecture, **options), SHAPE)


def test_the_config_loads_one_and_rows_say_so(tokenizer, tmp_path):
    make_tiny(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    shape = replace(SHAPE, vocab_size=300)
    sizes = [f"target.shape.{name}={value}" for name, value in asdict(shape).items()]
    words = ["target=stand_in", f"target.path={tmp_path}/tiny", "target.dtype=float32", *sizes, "output=rows.jsonl"]
    typed = configs.to_typed(configs.compose("generate", words))
    target = load_target(typed.target)
    assert ModelShape.of(target.model) == shape
    assert target.tokenizer is not None
    assert target_labels(typed.target) == {"target": "tiny", "stand_in": True, "shape": asdict(shape)}
    default = configs.to_typed(configs.compose("generate", ["target=stand_in", "output=rows.jsonl"])).target
    assert ModelShape(**asdict(default.shape)) == ModelShape()
    with pytest.raises(ValueError, match="dtype 'half' is unknown"):
        load_stand_in(tmp_path / "tiny", shape, dtype="half")


@pytest.mark.parametrize(
    "options", [{"draft_vocab_size": 40}, {"feature_layers": (0, 1, 2)}, {"norm_before_residual": True}]
)
def test_an_eagle_head_is_widened_with_its_target(options, tmp_path):
    base, generator = make_tiny(), torch.Generator().manual_seed(0)
    target, wide = PagedModel(base), StandIn(base, SHAPE)
    head = EagleHead(eagle_config(target, 3, **options))
    with torch.no_grad():
        for parameter in head.parameters():
            fresh = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(fresh * 0.25 if parameter.ndim > 1 else 1 + 0.1 * fresh)
        if head.draft_to_target_R is not None:
            head.draft_to_target_R.copy_(torch.randperm(VOCAB_SIZE, generator=generator)[:40].sort().values)
    found = widen_eagle(head, ModelShape.of(base), SHAPE, base.config.rms_norm_eps)
    ids, mask = torch.arange(5, 25), torch.ones(19, 19, dtype=torch.bool).tril()
    logits = []
    for model, one in ((target, head), (wide, found)):
        model.model.set_attn_implementation("eager")
        hidden = states(model.model, ids[None])[1]
        features = one.fuse([hidden[layer][0, :-1] for layer in one.config.feature_layers])
        with torch.no_grad():
            out = one(model.embed(ids[1:]), features, torch.arange(19), attend_within(mask))
            again = one(model.embed(ids[1:]), out, torch.arange(1, 20), attend_within(mask))
            logits.append(torch.cat([one.logits(out), one.logits(again)]))
        model.model.set_attn_implementation("specdec_paged")
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)
    policy, params = TopK(total=8, depth=3, k=2), SamplingParams(max_new_tokens=25, ignore_eos=True)
    save_head(head, tmp_path / "head")
    results = [
        Engine(Verifier(model), load_eagle(str(tmp_path / "head")), policy).generate([[5, 6, 7, 8]], params)[0]
        for model in (target, wide)
    ]
    assert results[0].token_ids == results[1].token_ids
    assert results[0].metrics.accepted_by_depth == results[1].metrics.accepted_by_depth
    save_head(MedusaHeads.initial(MedusaConfig(32, VOCAB_SIZE, 2, has_own_lm_head=False)), tmp_path / "medusa")
    with pytest.raises(ValueError, match="only EAGLE-3 heads can be widened"):
        Engine(Verifier(wide), load_medusa(str(tmp_path / "medusa")), policy)
    with pytest.raises(ValueError, match="widened are EAGLE-3 heads"):
        widen_eagle(EagleHead(eagle_config(target, 1)), ModelShape.of(base), SHAPE, 1e-6)
