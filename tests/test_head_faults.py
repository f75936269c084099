"""Checkpoints of heads that are wrong, ambiguous or made for another target: everything is named, nothing is guessed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import published
import pytest
import torch
from published import DRAFT, HIDDEN, LAYERS, VOCAB
from torch import Tensor

from specdec.drafters.heads import EagleConfig, EagleHead, MedusaConfig, MedusaHeads
from specdec.drafters.heads.formats import inspect_head, load_head, save_head
from specdec.loading import ModelSizes

TARGET = ModelSizes(HIDDEN, VOCAB, LAYERS)
KEY = "eagle_aux_hidden_state_layer_ids"


def eagle3_folder(place: Path, change: dict[str, Tensor | None] | None = None, **config: Any) -> Path:
    """An EAGLE-3 checkpoint with some tensors replaced (None: left out) and some settings, `nested` for eagle_config."""
    tensors, settings = published.eagle3()
    tensors |= change or {}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    nested = config.pop("nested", None)
    settings |= config | ({} if nested is None else {"eagle_config": {KEY: nested, "use_aux_hidden_state": True}})
    settings = {key: value for key, value in settings.items() if value is not ...}
    return published.write(place, tensors, settings, "model.safetensors")


def problems(folder: Path, target: ModelSizes | None = TARGET, **options: Any) -> str:
    """What `inspect_head` and `load_head` both complain about."""
    found = inspect_head(folder, target, **options).problems
    with pytest.raises(ValueError) as error:
        load_head(folder, target, **options)
    text = "; ".join(found)
    assert str(error.value) == f"{folder}: {text}" and "\n" not in text
    return text


def test_missing_and_unexpected_tensors_are_named_together(tmp_path: Path) -> None:
    change = {"midlayer.hidden_norm.weight": None, "norm.weight": None, "input_norm.weight": torch.ones(3 * HIDDEN)}
    assert problems(eagle3_folder(tmp_path, change)) == (
        "missing tensors: midlayer.hidden_norm.weight, norm.weight; unexpected tensors: input_norm.weight"
    )


def test_tensors_are_named_as_in_the_file(tmp_path: Path) -> None:
    tensors, config = published.speculators()
    del tensors["layers.0.hidden_norm.weight"], tensors["d2t"]
    tensors["layers.1.mlp.up_proj.weight"] = torch.zeros(2, 2)
    found = problems(published.write(tmp_path, tensors, config, "model.safetensors"))
    assert "d2t" in found and "layers.0.hidden_norm.weight" in found and "draft_to_target" not in found
    assert "unexpected tensors: layers.1.mlp.up_proj.weight" in found and "midlayer" not in found


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    tensors, config = published.medusa()
    keep = {name: tensor for name, tensor in tensors.items() if not name.startswith("1.")}
    published.write(tmp_path, keep | {"0.0.linear.extra": torch.zeros(1)}, config, "medusa_lm_head.pt")
    found = problems(tmp_path)
    assert "missing tensors: 1.0.linear.bias, 1.0.linear.weight, 1.1.linear.bias" in found
    assert "unexpected tensors: 0.0.linear.extra" in found


def test_wrong_shapes_and_types_are_named(tmp_path: Path) -> None:
    change = {"midlayer.mlp.down_proj.weight": torch.zeros(HIDDEN, 3)}
    assert problems(eagle3_folder(tmp_path / "a", change)) == (
        "wrong shapes: midlayer.mlp.down_proj.weight [32, 3] instead of [32, 48]"
    )
    change = {"lm_head.weight": torch.zeros(DRAFT, HIDDEN, dtype=torch.int8)}
    assert problems(eagle3_folder(tmp_path / "b", change)) == "wrong types: lm_head.weight torch.int8"


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"hidden_size": 64}, "hidden size: 32 by fc.weight, but 64 by hidden_size in config.json"),
        ({"target_hidden_size": 48}, "32 by fc.weight, of 3 hidden states, but 48 by target_hidden_size"),
        ({"intermediate_size": 40}, "MLP size: 48 by midlayer.mlp.gate_proj.weight, but 40 by"),
        ({"head_dim": 16}, "head size: 8 by q_proj.weight, but 16 by head_dim"),
        ({"num_key_value_heads": 4}, "number of key heads: 2 by k_proj.weight, but 4 by"),
        ({"vocab_size": 100}, "vocabulary: 97 by t2d, but 100 by vocab_size"),
        ({"draft_vocab_size": 30}, "draft vocabulary: 23 by lm_head.weight, but 30 by"),
        ({"num_attention_heads": ...}, "no num_attention_heads in config.json"),
        ({"num_attention_heads": "4"}, "num_attention_heads='4' in config.json is no whole number"),
        ({"rms_norm_eps": ...}, "rms_norm_eps=None in config.json is no positive number"),
        ({"rms_norm_eps": []}, "rms_norm_eps=[] in config.json is no positive number"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not served"),
        ({"norm_before_fc": True}, "norm_before_fc in config.json: heads of this kind are not served"),
        ({"rope_scaling": {"type": "unheard"}}, "is unknown or lacks something ('unheard')"),
        ({"rope_scaling": {"type": "linear"}}, "Missing required keys"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type=dynamic"),
        ({"rope_scaling": 3}, "config.json describes no head"),
        ({KEY: "abc"}, "is no list of layer ids"),
        ({KEY: [1, 2]}, "of its own, but 48 by fc.weight, of 2 hidden states"),
        ({KEY: [1, 2, 3, 4, 5]}, "fc.weight reads 96 numbers, no multiple of 5 hidden states"),
        ({KEY: [2, 4, 8]}, "hidden states [8] cannot be had of a target with 8 layers (0 to 7 can)"),
    ],
)
def test_contradictions_are_named_with_both_values(config: dict[str, Any], part: str, tmp_path: Path) -> None:
    found = problems(eagle3_folder(tmp_path, **config))
    assert part.partition(", but")[0] in found and part.rpartition(", but ")[2] in found, found


def test_a_file_without_config_says_what_only_config_tells(tmp_path: Path) -> None:
    tensors, _ = published.eagle1()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    found = problems(tmp_path / "pytorch_model.bin")
    assert "no num_attention_heads in config.json" in found and "rms_norm_eps=None" in found


def _offsets(**change: int) -> Tensor:
    ids = published.target_ids()
    for place, value in change.items():
        ids[int(place[1:])] = value
    return ids - torch.arange(DRAFT)


@pytest.mark.parametrize(
    ("d2t", "part"),
    [
        (_offsets(_0=-1), "d2t leads to -1, outside the vocabulary of 97"),
        (_offsets(_22=97), "d2t leads to 97, outside the vocabulary of 97"),
        (_offsets(_3=10), "d2t leads to 10 from 2 draft tokens, not one"),
        (_offsets(_1=10, _2=6), "d2t leads to 6 behind a larger id"),
        (_offsets(_1=7), "t2d and d2t disagree about 2 tokens, the first 6"),
        (published.target_ids(), "d2t holds target ids; it must hold offsets"),
        (torch.zeros(DRAFT), "d2t is torch.float32 [23], not a list of integers"),
        (torch.zeros(DRAFT - 1, dtype=torch.int64), "wrong shapes: d2t [22] instead of [23]"),
        (None, "missing tensors: d2t, and t2d is there"),
    ],
)
def test_offsets_must_be_a_vocabulary(d2t: Tensor | None, part: str, tmp_path: Path) -> None:
    change: dict[str, Tensor | None] = {"d2t": d2t}
    if d2t is not None and len(d2t) < DRAFT:
        change["t2d"] = None
    assert part in problems(eagle3_folder(tmp_path, change))


def test_the_mask_may_be_left_out_and_must_fit(tmp_path: Path) -> None:
    head = load_head(eagle3_folder(tmp_path / "a", {"t2d": None}), TARGET)
    assert isinstance(head, EagleHead) and head.draft_to_target_R is not None
    assert head.draft_to_target_R.equal(published.target_ids())
    found = problems(eagle3_folder(tmp_path / "b", {"t2d": torch.ones(VOCAB + 1, dtype=torch.bool)}))
    assert "vocabulary: 98 by t2d, but 97 by vocab_size" in found


@pytest.mark.parametrize(
    ("config", "layers", "note"),
    [
        ({}, (2, 4, 5), ""),
        ({KEY: [1, 4, 6]}, (1, 4, 6), "read as inputs"),
        ({"nested": [1, 3, 4]}, (2, 4, 5), "read as outputs"),
        ({"nested": [2, 4, 5]}, (2, 4, 5), "read as inputs"),
        ({KEY: [2, 4, 6], "nested": [1, 3, 5]}, (2, 4, 6), "read as inputs"),
    ],
)
def test_layer_ids_are_read_by_the_convention_of_their_place(
    config: dict[str, Any], layers: tuple[int, ...], note: str, tmp_path: Path
) -> None:
    folder = eagle3_folder(tmp_path, **config)
    head = load_head(folder, TARGET)
    assert isinstance(head, EagleHead) and head.config.feature_layers == layers
    assert note in "; ".join(inspect_head(folder, TARGET).notes)


def test_the_convention_of_layer_ids_can_be_overruled(tmp_path: Path) -> None:
    folder = eagle3_folder(tmp_path, **{KEY: [1, 3, 4]})
    assert load_head(folder, TARGET, layer_ids="output").config.feature_layers == (2, 4, 5)
    assert load_head(folder, TARGET, layer_ids="input").config.feature_layers == (1, 3, 4)
    with pytest.raises(ValueError, match="layer_ids='behind' is unknown; use input or output"):
        load_head(folder, TARGET, layer_ids="behind")


def test_inputs_of_layers_are_transformers_hidden_states_of_the_same_index(tiny) -> None:
    model = tiny(num_hidden_layers=5)
    entering: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    with torch.inference_mode():
        states = model(torch.tensor([[1, 5, 9]]), output_hidden_states=True).hidden_states
    assert len(entering) == 5
    for i, state in enumerate(entering):
        torch.testing.assert_close(states[i], state, rtol=0, atol=0)


@pytest.mark.parametrize("make", [published.eagle1, published.eagle3])
def test_layers_that_only_the_target_tells_need_the_target(make, tmp_path: Path) -> None:
    folder = published.write(tmp_path, *make(), "model.safetensors")
    report = inspect_head(folder)
    assert report.is_sound and report.unknown == ("feature_layers",)
    with pytest.raises(ValueError, match="only the target tells its feature_layers; give the target"):
        load_head(folder)
    small = replace(TARGET, num_layers=2)
    if make is published.eagle3:
        assert "hidden states [2, -1] cannot be had of a target with 2 layers" in problems(folder, small)
    else:
        assert load_head(folder, small).config.feature_layers == (2,)


def test_the_residual_of_a_speculators_head_is_never_guessed(tmp_path: Path) -> None:
    tensors, config = published.speculators()
    del config["norm_before_residual"]
    folder = published.write(tmp_path, tensors, config, "model.safetensors")
    assert "give norm_before_residual=true or false" in problems(folder)
    for value in (True, False):
        assert load_head(folder, TARGET, norm_before_residual=value).config.norm_before_residual is value


def test_other_speculators_are_refused(tmp_path: Path) -> None:
    tensors, config = published.speculators()
    config["speculators_model_type"] = "dflash"
    found = problems(published.write(tmp_path, tensors, config, "model.safetensors"))
    assert "speculators_model_type='dflash' is not read here; eagle3 is" in found


@pytest.mark.parametrize("make", [published.medusa, published.eagle1, published.eagle3, published.speculators])
def test_another_target_is_refused(make, tmp_path: Path) -> None:
    folder = published.write(tmp_path, *make(), "model.safetensors")
    assert "made for a target of hidden size 32; this one has 64" in problems(folder, ModelSizes(64, VOCAB, LAYERS))
    assert "made for a vocabulary of 97; this target has 99" in problems(folder, ModelSizes(HIDDEN, 99, LAYERS))


def test_something_else_is_no_head(tmp_path: Path) -> None:
    published.write(tmp_path, {"model.embed_tokens.weight": torch.zeros(2, 2)}, {}, "model.safetensors")
    for read in (load_head, inspect_head):
        with pytest.raises(ValueError, match=r"holds no Medusa or EAGLE head: its tensors are model\.embed_tokens"):
            read(tmp_path)


def test_a_damaged_file_is_a_problem_of_the_report(tmp_path: Path) -> None:
    folder = eagle3_folder(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    report = inspect_head(folder)
    assert report.format == "unreadable" and not report.is_sound and "cut off or corrupt" in report.problems[0]
    with pytest.raises(ValueError, match="cut off or corrupt"):
        load_head(folder)


@pytest.mark.parametrize(
    ("held", "part"),
    [
        ({"version": 2}, "specdec.version=2 in config.json is unknown; this release reads 1"),
        ("yes", "specdec.version='yes' in config.json is unknown"),
        ({"version": 1, "drafter": "eagle3", "config": {"version": 3, "size": 1}}, "config.json describes no head"),
        ({"version": 1, "drafter": "medusa"}, "config.json describes no head: KeyError: 'config'"),
        (
            {"version": 1, "drafter": "eagle1", "config": {**published.__dict__["SETTINGS"]}},
            "config.json describes no head: TypeError",
        ),
    ],
)
def test_a_foreign_config_of_our_own_format_is_refused(held: Any, part: str, tmp_path: Path) -> None:
    tensors, _ = published.eagle3()
    assert part in problems(published.write(tmp_path, tensors, {"specdec": held}, "model.safetensors"))


EAGLE_3 = EagleConfig(
    version=3,
    hidden_size=16,
    target_hidden_size=16,
    intermediate_size=24,
    num_heads=2,
    num_kv_heads=1,
    head_size=8,
    rms_norm_eps=1e-6,
    vocab_size=31,
    draft_vocab_size=31,
    feature_layers=(2, 4, 5),
)
EAGLE_1 = replace(EAGLE_3, version=1, feature_layers=(8,), has_own_lm_head=False)
SMALL = ModelSizes(16, 31, 8)


@pytest.mark.parametrize(
    ("config", "formats", "part"),
    [
        (replace(EAGLE_1, has_own_lm_head=True), ("eagle", "vllm"), "end an EAGLE-1 head in the target's LM head"),
        (replace(EAGLE_1, fc_bias=True), ("vllm",), "vLLM builds fc without a bias and would drop this head's"),
        (replace(EAGLE_1, attention_bias=True), ("eagle",), "no bias in its attention"),
        (replace(EAGLE_3, has_own_lm_head=False), ("eagle3", "vllm", "speculators"), "expect an LM head"),
        (replace(EAGLE_3, fc_bias=True), ("eagle3", "vllm", "speculators"), "build fc without a bias"),
        (
            replace(EAGLE_3, feature_layers=(2, 4)),
            ("eagle3", "vllm", "speculators"),
            "three hidden states, this head 2",
        ),
        (replace(EAGLE_3, feature_layers=(2, 4, 8)), ("eagle3", "vllm", "speculators"), "the one behind it (8)"),
        (replace(EAGLE_3, norm_before_residual=True), ("eagle3",), "use vllm or speculators"),
        (replace(EAGLE_3, attention_bias=True), ("eagle3",), "use vllm or speculators"),
        (
            replace(EAGLE_3, feature_layers=(1, 4, 6)),
            ("eagle3",),
            "reads the hidden states (2, 4, 5), this head (1, 4, 6)",
        ),
    ],
)
def test_a_format_whose_readers_would_compute_something_else_is_refused(
    config: EagleConfig, formats: tuple[str, ...], part: str, tmp_path: Path
) -> None:
    head = EagleHead(config)
    possible = ("eagle", "vllm") if config.version == 1 else ("eagle3", "vllm", "speculators")
    for format in possible:
        if format in formats:
            with pytest.raises(ValueError) as error:
                save_head(head, tmp_path / format, format, target=SMALL)
            assert str(error.value).startswith(f"format={format}: ") and part in str(error.value)
            assert not (tmp_path / format).exists()
        else:
            save_head(head, tmp_path / format, format, target=SMALL)
    # Our own format holds whatever the network can be.
    save_head(head, tmp_path / "specdec")
    assert load_head(tmp_path / "specdec", SMALL).config == config


def test_a_format_for_other_heads_is_refused(tmp_path: Path) -> None:
    heads = MedusaHeads(MedusaConfig(8, 11, 2))
    with pytest.raises(ValueError, match="format=eagle3 holds no medusa head; use one of medusa, vllm, specdec"):
        save_head(heads, tmp_path, "eagle3")
    with pytest.raises(
        ValueError, match="format=eagle holds no eagle3 head; use one of eagle3, vllm, speculators, specdec"
    ):
        save_head(EagleHead(EAGLE_3), tmp_path, "eagle")
    with pytest.raises(ValueError, match="format='gguf' is unknown; use one of medusa, eagle, "):
        save_head(heads, tmp_path, "gguf")
