"""The networks that draft from the target's features, against forwards written out here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from head_cases import attend_within, dense_eagle
from torch.nn.functional import linear, silu

from specdec import PagedModel
from specdec.drafters.heads import EagleConfig, EagleHead, MedusaConfig, MedusaHeads

CONFIG = EagleConfig(
    version=1,
    hidden_size=24,
    target_hidden_size=24,
    intermediate_size=40,
    num_heads=6,
    num_kv_heads=2,
    head_size=8,
    rms_norm_eps=1e-5,
    vocab_size=50,
    draft_vocab_size=50,
    feature_layers=(4,),
    rope={"rope_type": "default", "rope_theta": 100.0},
    max_positions=64,
)
EAGLE_3 = replace(CONFIG, version=3, has_own_lm_head=True, draft_vocab_size=20, feature_layers=(1, 2, 4))
VERSIONS = {
    "1": CONFIG,
    "1, biases": replace(CONFIG, fc_bias=True, attention_bias=True, max_positions=None),
    "3": EAGLE_3,
    "3, as in speculators": replace(EAGLE_3, norm_before_residual=True, draft_vocab_size=50),
    "3, wider": replace(EAGLE_3, hidden_size=32, has_own_embedding=True),
}


def random_head(config: EagleConfig, seed: int = 0) -> EagleHead:
    torch.manual_seed(seed)
    head = EagleHead(config)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return head


@pytest.mark.parametrize("name", VERSIONS)
def test_eagle_is_the_layer_of_the_papers(name: str) -> None:
    config = VERSIONS[name]
    head, length = random_head(config), 9
    embeddings = torch.randn(length, config.hidden_size)
    features = [torch.randn(length, config.target_hidden_size) for _ in config.feature_layers]
    positions = torch.tensor([0, 1, 2, 5, 6, 3, 3, 4, 40])
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    fused = head.fuse(features)
    if config.version == 3:
        torch.testing.assert_close(fused, linear(torch.cat(features, -1), head.fc.weight))
    else:
        assert fused is features[0]
    hidden = head(embeddings, fused, positions, attend_within(mask))
    wanted = dense_eagle(head, embeddings, fused, positions, mask)
    torch.testing.assert_close(hidden, wanted, rtol=1e-4, atol=1e-4)
    logits = head.logits(hidden, None if config.has_own_lm_head else lambda x: x[:, :5])
    if config.has_own_lm_head:
        normed = hidden * (hidden.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * head.norm.weight
        torch.testing.assert_close(logits, normed @ head.lm_head.weight.T, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(logits, hidden[:, :5])


def test_eagle_parameters_have_their_published_names() -> None:
    attention = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
    mlp = [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    layer = [*attention, *mlp, "post_attention_layernorm.weight"]
    assert set(EagleHead(CONFIG).state_dict()) == {"fc.weight", *(f"layers.0.{name}" for name in layer)}
    layer += ["input_layernorm.weight", "hidden_norm.weight"]
    state = EagleHead(replace(EAGLE_3, has_own_embedding=True)).state_dict()
    names = {"fc.weight", "norm.weight", "lm_head.weight", "embed_tokens.weight", "draft_to_target_R"}
    assert set(state) == names | {f"midlayer.{name}" for name in layer}
    assert state["draft_to_target_R"].dtype == torch.int64 and state["draft_to_target_R"].shape == (20,)


def test_eagle_keeps_its_frequencies_when_cast_and_serves_training_after_inference() -> None:
    head, positions = random_head(CONFIG), torch.tensor([61, 62, 63])
    inputs = [torch.randn(3, 24), torch.randn(3, 24), positions, attend_within(torch.ones(3, 3).tril() > 0)]
    with torch.inference_mode():
        before = head(*inputs)
    after = head.bfloat16().float()(*inputs)
    after.sum().backward()
    assert head.fc.weight.grad is not None
    head.load_state_dict(random_head(CONFIG).state_dict())
    assert torch.equal(head(*inputs), before)


def test_medusa_heads_start_as_the_target_itself(tiny) -> None:
    target = PagedModel(tiny(0))
    hidden = torch.randn(5, target.hidden_size)
    for own in (True, False):
        config = MedusaConfig(target.hidden_size, target.vocab_size, 3, num_layers=2, has_own_lm_head=own)
        heads = MedusaHeads.initial(config, target.model.lm_head.weight if own else None)
        assert all(torch.equal(states, hidden) for states in heads(hidden))
        logits = heads.logits(hidden, target.lm_head)
        torch.testing.assert_close(logits, target.lm_head(hidden).expand(3, -1, -1))
        assert heads.logits(hidden, target.lm_head, 2).shape == (2, 5, target.vocab_size)
    assert {name for name in heads.state_dict() if name.startswith("2.")} == {
        f"2.{block}.linear.{part}" for block in (0, 1) for part in ("weight", "bias")
    }
    with pytest.raises(ValueError, match=r"\(97, 32\), not None"):
        MedusaHeads.initial(replace(config, has_own_lm_head=True))


def test_medusa_heads_are_residual_blocks_and_an_lm_head() -> None:
    torch.manual_seed(0)
    heads, hidden = MedusaHeads(MedusaConfig(8, 11, 2, num_layers=2)), torch.randn(4, 8)
    weights = heads.state_dict()
    for i, (states, logits) in enumerate(zip(heads(hidden), heads.logits(hidden), strict=True)):
        wanted = hidden
        for block in (0, 1):
            name = f"{i}.{block}.linear"
            wanted = wanted + silu(wanted @ weights[f"{name}.weight"].T + weights[f"{name}.bias"])
        torch.testing.assert_close(states, wanted)
        torch.testing.assert_close(logits, wanted @ weights[f"{i}.2.weight"].T)


def test_a_model_embeds_tokens_and_reads_states_behind_its_norm(tiny) -> None:
    model = tiny(0)
    out = model(torch.tensor([[5, 6, 7]]), output_hidden_states=True)
    target = PagedModel(model)
    assert torch.equal(target.embed(torch.tensor([5, 6, 7])), out.hidden_states[0][0])
    torch.testing.assert_close(target.lm_head(out.hidden_states[target.num_layers][0]), out.logits[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version=2"),
        ({"feature_layers": (1, 2)}, r"feature_layers=\(1, 2\)"),
        ({"num_kv_heads": 4}, "num_heads=6 is not a multiple of num_kv_heads=4"),
        ({"hidden_size": 20}, "hidden_size=20 differs from target_hidden_size=24"),
        ({"draft_vocab_size": 51}, "draft_vocab_size=51"),
        ({"draft_vocab_size": 20}, "LM head of its own"),
        ({"rope": {"rope_type": "dynamic", "rope_theta": 1.0, "factor": 2.0}}, "rope_type=dynamic"),
    ],
)
def test_contradictions_in_a_head_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)
    with pytest.raises(ValueError, match="num_heads=0"):
        MedusaConfig(8, 8, 0)
