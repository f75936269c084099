"""Learned heads in published formats: the same logits as the published layout says, the same tensors written again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import published
import pytest
import torch
from published import HIDDEN, LAYERS, VOCAB
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig

from specdec.checkpoint import read_checkpoint
from specdec.drafters.heads import EagleHead, MedusaHeads
from specdec.drafters.heads.formats import FORMATS, inspect_head, load_head, save_head
from specdec.loading import ModelSizes

TARGET = ModelSizes(HIDDEN, VOCAB, LAYERS)
T = 7
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Layout:
    """A published checkpoint: how it is made, and which format it is recognised as."""

    make: Callable[..., tuple[dict[str, Tensor], dict[str, Any]]]
    format: str
    file: str = "model.safetensors"
    logits: str = "medusa"

    @property
    def exported_as(self) -> str:
        return self.format


def in_vllm_names(**options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, _ = published.medusa(**options)
    renamed = {}
    for name, tensor in tensors.items():
        head, block, *rest = name.split(".")
        renamed[f"blocks.{head}.layers.{block}.{rest[-1]}" if len(rest) > 1 else f"lm_heads.{head}.weight"] = tensor
    sizes = {"hidden_size": HIDDEN, "vocab_size": VOCAB, "num_heads": 3, "num_hidden_layers": 2, "medusa_fc_bias": True}
    return renamed, {"model_type": "medusa", "architectures": ["MedusaModel"]} | sizes


def with_ids(**options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, config = published.eagle3("layers.0.", **options)
    return tensors, config | {"eagle_aux_hidden_state_layer_ids": [1, 4, 6]}


def plain_speculators(**options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return published.speculators(norm_before_residual=False, **options)


def wide_eagle3(**options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return published.eagle3(hidden=40, own_embedding=True, **options)


def eagle1_without_bias(**options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return published.eagle1(bias=False, own_embedding=False, **options)


LAYOUTS = {
    "medusa": Layout(published.medusa, "medusa", "medusa_lm_head.safetensors"),
    "medusa pickle": Layout(published.medusa, "medusa", "medusa_lm_head.pt"),
    "medusa vllm": Layout(in_vllm_names, "vllm"),
    "eagle pickle": Layout(published.eagle1, "eagle", "pytorch_model.bin", "eagle1"),
    "eagle": Layout(published.eagle1, "eagle", logits="eagle1"),
    "eagle shared": Layout(eagle1_without_bias, "eagle", logits="eagle1"),
    "eagle3 pickle": Layout(published.eagle3, "eagle3", "pytorch_model.bin", "eagle3"),
    "eagle3": Layout(published.eagle3, "eagle3", logits="eagle3"),
    "eagle3 of another width": Layout(wide_eagle3, "eagle3", logits="eagle3"),
    "eagle3 vllm": Layout(with_ids, "vllm", logits="eagle3"),
    "speculators": Layout(published.speculators, "speculators", logits="eagle3"),
    "speculators, norm after": Layout(plain_speculators, "speculators", logits="eagle3"),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def causal(query_THE: Tensor, key_TGE: Tensor, value_TGE: Tensor) -> Tensor:
    query, key, value = (one.transpose(0, 1)[None] for one in (query_THE, key_TGE, value_TGE))
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def inputs(width: int = HIDDEN) -> tuple[Tensor, list[Tensor], Tensor]:
    """Embeddings [T, width], three features [T, HIDDEN] and the target's LM head."""
    generator = torch.Generator().manual_seed(9)
    features = [torch.randn(T, HIDDEN, generator=generator) for _ in range(3)]
    lm_head_VD = torch.randn(VOCAB, HIDDEN, generator=generator) * 0.1
    return torch.randn(T, width, generator=generator), features, lm_head_VD


def head_logits(head: MedusaHeads | EagleHead) -> Tensor:
    """What the head itself says to `inputs`, over the target's vocabulary."""
    embeddings, features, lm_head = inputs(head.config.hidden_size)
    if isinstance(head, MedusaHeads):
        return head.logits(features[0], lambda hidden: hidden @ lm_head.T)
    hidden = head(embeddings, head.fuse(features[: len(head.config.feature_layers)]), torch.arange(T), causal)
    logits = head.logits(hidden, lambda hidden: hidden @ lm_head.T)
    if head.draft_to_target_R is None:
        return logits
    return torch.full((T, VOCAB), -torch.inf).index_copy(1, head.draft_to_target_R, logits)


def published_logits(layout: Layout, tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """What the published layout says to `inputs`."""
    embeddings, features, lm_head = inputs(config.get("hidden_size", HIDDEN))
    if layout.logits == "medusa":
        return published.medusa_logits(published.medusa()[0], features[0])
    if layout.logits == "eagle1":
        return published.eagle1_logits(tensors, embeddings, features[0], lm_head)
    return published.eagle3_logits(tensors, embeddings, features, config.get("norm_before_residual", False))


def same(found: Any, wanted: Any) -> bool:
    return found.keys() == wanted.keys() and all(
        (found[name].dtype, found[name].shape) == (wanted[name].dtype, wanted[name].shape)
        and found[name].view(torch.uint8).equal(wanted[name].view(torch.uint8))
        for name in wanted
    )


@every_layout
def test_logits_are_those_of_the_published_layout(layout: Layout, tmp_path: Path) -> None:
    tensors, config = layout.make()
    head = load_head(published.write(tmp_path, tensors, config, layout.file), TARGET)
    with torch.inference_mode():
        torch.testing.assert_close(head_logits(head), published_logits(layout, tensors, config))


@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
def test_tensors_come_back_byte_for_byte(layout: Layout, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors, config = layout.make(dtype=dtype)
    head = load_head(published.write(tmp_path / "one", tensors, config, layout.file), TARGET)
    save_head(head, tmp_path / "two", layout.format, base_model="org/target", target=TARGET)
    again = read_checkpoint(tmp_path / "two")
    assert same(again.tensors, tensors)
    assert load_head(tmp_path / "two", TARGET).config == head.config
    report = inspect_head(tmp_path / "two", TARGET)
    assert (report.format, report.base_model, report.problems) == (layout.format, "org/target", ())


@every_layout
def test_every_format_that_holds_a_head_holds_it_whole(layout: Layout, tmp_path: Path) -> None:
    tensors, config = layout.make(dtype=BF16)
    head = load_head(published.write(tmp_path / "one", tensors, config, layout.file), TARGET)
    drafter = "medusa" if isinstance(head, MedusaHeads) else f"eagle{head.config.version}"
    for format in (name for name, drafters in FORMATS.items() if drafter in drafters):
        try:
            save_head(head, tmp_path / format, format, target=TARGET)
        except ValueError as error:
            # Refused where the format's reader would compute something else; such reasons have tests of their own.
            assert "fc without a bias" in str(error) or "hidden_norm" in str(error) or "hidden states" in str(error)
            continue
        back = load_head(tmp_path / format, TARGET)
        assert back.config == head.config
        assert same(back.state_dict(), head.state_dict())


@pytest.mark.parametrize("prefix", ["medusa_heads.", "medusa_head."])
def test_medusa_prefixes_are_taken_off(prefix: str, tmp_path: Path) -> None:
    tensors, config = published.medusa(prefix=prefix)
    head = load_head(published.write(tmp_path, tensors, config, "medusa_lm_head.safetensors"))
    assert same(head.state_dict(), published.medusa()[0])


def test_medusa_heads_without_lm_heads_end_in_the_targets(tmp_path: Path) -> None:
    tensors, config = published.medusa(own_lm_head=False)
    published.write(tmp_path, tensors, config, "medusa_lm_head.safetensors")
    with pytest.raises(ValueError, match="only the target tells its vocab_size; give the target"):
        load_head(tmp_path)
    report = inspect_head(tmp_path)
    assert report.is_sound and report.unknown == ("vocab_size",)
    head = load_head(tmp_path, TARGET)
    assert head.config.vocab_size == VOCAB and not head.config.has_own_lm_head
    lm_head = inputs()[2]
    torch.testing.assert_close(head_logits(head), published.medusa_logits(tensors, inputs()[1][0], lm_head))
    # Our config.json says what Medusa's leaves out.
    save_head(head, tmp_path / "two", "medusa")
    assert load_head(tmp_path / "two").config == head.config
    with pytest.raises(ValueError, match="vLLM loads no Medusa heads that end in the target's LM head"):
        save_head(head, tmp_path / "three", "vllm")


def test_medusa_files_may_hold_more_heads_than_config_names_not_fewer(tmp_path: Path) -> None:
    tensors, config = published.medusa()
    head = load_head(published.write(tmp_path / "a", tensors, config | {"medusa_num_heads": 2}, "medusa_lm_head.pt"))
    assert head.config.num_heads == 3
    assert "names 2 heads, the file holds 3" in inspect_head(tmp_path / "a").notes[0]
    published.write(tmp_path / "b", tensors, config | {"medusa_num_heads": 4}, "medusa_lm_head.pt")
    with pytest.raises(ValueError, match=r"missing tensors: 3\.0\.linear\.bias, 3\.0\.linear\.weight, "):
        load_head(tmp_path / "b")
    published.write(tmp_path / "c", tensors, None, "medusa_lm_head.pt")
    assert load_head(tmp_path / "c").config == head.config


def test_the_bias_of_fc_is_inferred_from_the_tensor(tmp_path: Path) -> None:
    for bias in (True, False):
        tensors, config = published.eagle1(bias=bias)
        published.write(tmp_path / str(bias), tensors, config | {"bias": not bias}, "pytorch_model.bin")
        assert load_head(tmp_path / str(bias), TARGET).config.fc_bias is bias


def test_biases_of_the_attention_are_inferred_from_the_tensors(tmp_path: Path) -> None:
    tensors, config = published.eagle1()
    for one in "qkvo":
        weight = tensors[f"layers.0.self_attn.{one}_proj.weight"]
        tensors[f"layers.0.self_attn.{one}_proj.bias"] = torch.ones(len(weight))
    head = load_head(published.write(tmp_path, tensors, config, "model.safetensors"), TARGET)
    assert head.config.attention_bias
    with pytest.raises(ValueError, match="no bias in its attention"):
        save_head(head, tmp_path / "two", "eagle")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500.0},
        {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
        {
            "rope_theta": 500.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ],
    ids=["default", "linear, old keys", "linear, new keys", "llama3"],
)
def test_rotary_embedding_survives_every_format(rope: dict[str, Any], tmp_path: Path) -> None:
    tensors, config = with_ids()
    del config["rope_theta"]
    head = load_head(published.write(tmp_path / "one", tensors, config | rope, "model.safetensors"), TARGET)
    assert head.config.rope["rope_theta"] == 500.0
    for format in ("vllm", "speculators", "specdec"):
        save_head(head, tmp_path / format, format)
        back = load_head(tmp_path / format, TARGET)
        assert back.config == head.config
        torch.testing.assert_close(head_logits(back), head_logits(head), rtol=0, atol=0)
    if "rope_scaling" not in rope and "rope_parameters" not in rope:
        torch.testing.assert_close(
            head_logits(head), published.eagle3_logits(tensors, inputs()[0], inputs()[1], theta=500.0)
        )


def test_the_base_of_rotary_embedding_is_eagles_default_where_none_is_given(tmp_path: Path) -> None:
    tensors, config = published.eagle3()
    del config["rope_theta"]
    head = load_head(published.write(tmp_path, tensors, config, "model.safetensors"), TARGET)
    torch.testing.assert_close(head_logits(head), published.eagle3_logits(tensors, *inputs()[:2], theta=10000.0))


def test_a_whole_draft_vocabulary_needs_no_offsets(tmp_path: Path) -> None:
    tensors, config = published.eagle3()
    tensors["lm_head.weight"] = torch.randn(VOCAB, HIDDEN)
    tensors |= {"d2t": torch.zeros(VOCAB, dtype=torch.int64), "t2d": torch.ones(VOCAB, dtype=torch.bool)}
    config["draft_vocab_size"] = VOCAB
    head = load_head(published.write(tmp_path / "one", tensors, config, "model.safetensors"), TARGET)
    assert head.draft_to_target_R is None and not head.config.is_reduced
    save_head(head, tmp_path / "two", "eagle3")
    assert same(read_checkpoint(tmp_path / "two").tensors, tensors)
    save_head(head, tmp_path / "three", "speculators")
    assert not {"d2t", "t2d"} & read_checkpoint(tmp_path / "three").tensors.keys()
    assert load_head(tmp_path / "three", TARGET).config == head.config


def test_what_is_not_the_heads_is_left_out_and_said(tmp_path: Path) -> None:
    tensors, config = published.speculators()
    idle = {"verifier_norm.weight": torch.ones(HIDDEN), "verifier_lm_head.weight": torch.zeros(VOCAB, HIDDEN)}
    published.write(tmp_path, tensors | idle, config, "model.safetensors")
    assert "left out, not the head's: verifier_lm_head.weight, verifier_norm.weight" in inspect_head(tmp_path).notes
    assert isinstance(load_head(tmp_path), EagleHead)


def test_heads_are_loaded_in_the_type_asked_for(tmp_path: Path) -> None:
    tensors, config = published.eagle3()
    head = load_head(published.write(tmp_path, tensors, config, "model.safetensors"), TARGET, dtype=BF16)
    assert {parameter.dtype for parameter in head.parameters()} == {BF16}
    assert head.draft_to_target_R.dtype == torch.int64


def exported(layout: str, format: str, place: Path) -> dict[str, Any]:
    """config.json of a layout's head in another format."""
    chosen = LAYOUTS[layout]
    head = load_head(published.write(place / "one", *chosen.make(), chosen.file), TARGET)
    save_head(head, place / "two", format, base_model="org/target", target=TARGET)
    return json.loads((place / "two" / "config.json").read_text())


@pytest.mark.parametrize("layout", ["eagle", "eagle shared"])
def test_eagles_code_is_told_of_the_bias(layout: str, tmp_path: Path) -> None:
    # ea_model.py: a missing `bias` means true.
    assert exported(layout, "eagle", tmp_path)["bias"] is (layout == "eagle")


@pytest.mark.parametrize("layout", ["eagle3", "eagle3 of another width"])
def test_eagles_code_is_told_of_another_width_and_only_of_another(layout: str, tmp_path: Path) -> None:
    # cnets.py: with `target_hidden_size`, whatever its value, the embedding is the head's own.
    config = exported(layout, "eagle3", tmp_path)
    assert config.get("target_hidden_size") == (None if layout == "eagle3" else HIDDEN)
    assert (config["draft_vocab_size"], config["vocab_size"]) == (published.DRAFT, VOCAB)


def test_vllm_is_told_of_the_sizes_of_medusa_heads(tmp_path: Path) -> None:
    # configs/medusa.py and models/medusa.py: without medusa_fc_bias the biases would be dropped.
    config = exported("medusa", "vllm", tmp_path)
    wanted = {
        "model_type": "medusa",
        "hidden_size": HIDDEN,
        "vocab_size": VOCAB,
        "num_heads": 3,
        "num_hidden_layers": 2,
    }
    assert config.items() >= (wanted | {"medusa_fc_bias": True}).items()


@pytest.mark.parametrize("format", ["eagle3", "vllm", "speculators"])
def test_the_layer_is_a_llama_config_that_transformers_reads(format: str, tmp_path: Path) -> None:
    config = exported("eagle3", format, tmp_path)
    layer = LlamaConfig(**(config["transformer_layer_config"] if format == "speculators" else config))
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps"):
        assert getattr(layer, key) == published.SETTINGS[key]
    assert layer.rope_parameters == {"rope_theta": 500.0, "rope_type": "default"} and layer.head_dim == published.SIZE
    assert (layer.max_position_embeddings, layer.num_hidden_layers, layer.attention_bias) == (64, 1, False)


def test_speculators_finds_what_it_requires(tmp_path: Path) -> None:
    # speculators/config.py, models/eagle3/config.py and vLLM's validate_speculators_config.
    config = exported("eagle3 vllm", "speculators", tmp_path)
    inner = config["speculators_config"]
    assert config["speculators_model_type"] == inner["algorithm"] == "eagle3"
    assert inner["default_proposal_method"] == inner["proposal_methods"][0]["proposal_type"] == "greedy"
    assert inner["proposal_methods"][0]["speculative_tokens"] > 0
    assert inner["verifier"].keys() == {"name_or_path", "architectures"}
    assert inner["verifier"]["name_or_path"] == "org/target"
    assert config["norm_before_residual"] is False and config["draft_vocab_size"] == published.DRAFT
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 4, 6]
