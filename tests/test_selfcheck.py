"""The self-check: right attention passes, every wrong one is caught, passes are remembered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny

from specdec import attention, passed, reduction, selfcheck
from specdec.attention import UnsupportedModelError
from specdec.kernels.tree_attention import SequencePlan
from specdec.kernels.tree_attention import reference as kernel
from specdec.kv_cache import KVCache
from specdec.model import PagedModel
from specdec.selfcheck import self_check

OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4096},
    "gemma2": {"head_dim": 8, "sliding_window": 4096, "query_pre_attn_scalar": 5},
    "gemma3_text": {"head_dim": 8, "num_hidden_layers": 12},
    "granite": {"attention_multiplier": 0.05},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {"head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt2": {"n_positions": 128},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gemma3n_text": {
        "head_dim": 8,
        "num_hidden_layers": 20,
        "num_kv_shared_layers": 5,
        "vocab_size_per_layer_input": 97,
        "hidden_size_per_layer_input": 8,
    },
}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("SPECDEC_CACHE", str(folder))
    return folder


def make_model(architecture: str = "llama", dtype: torch.dtype = torch.float32, **overrides: object) -> PagedModel:
    options = {"num_hidden_layers": 3} | OPTIONS.get(architecture, {}) | overrides
    return PagedModel(make_tiny(architecture=architecture, **options).to(dtype))


@pytest.mark.parametrize("architecture", OPTIONS)
def test_right_attention_passes(architecture):
    self_check(make_model(architecture))


def test_the_margin_is_wide(monkeypatch):
    """Rounding stays a decade below the tolerance, so that no machine raises a false alarm."""
    worst: list[float] = []
    measure = selfcheck._worst
    monkeypatch.setattr(selfcheck, "_worst", lambda *logits: worst.append(measure(*logits)) or worst[-1])
    for architecture in ("llama", "gemma2", "gpt_oss", "mixtral"):
        self_check(make_model(architecture))
    assert len(worst) == 4
    assert max(worst) < selfcheck.TOLERANCE / 10


def without(*names: str, **instead: object) -> Callable[[pytest.MonkeyPatch], None]:
    """An attention function that ignores some keywords of the kernel, or takes others instead."""

    def breaks(monkeypatch: pytest.MonkeyPatch) -> None:
        right = attention.tree_attention

        def wrong(
            query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, plan: Any, **options: Any
        ) -> torch.Tensor:
            options |= dict.fromkeys(names) | {k: v(options[k]) if callable(v) else v for k, v in instead.items()}
            return right(query, keys, values, plan, **options)

        monkeypatch.setattr(attention, "tree_attention", wrong)

    return breaks


def siblings_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SequencePlan._build_mask

    def wrong(self: SequencePlan, window: int | None) -> torch.Tensor | None:
        if self.tail_mask_QM is not None:
            queries, tail = self.tail_mask_QM.shape
            self.tail_mask_QM = torch.ones(queries, tail, dtype=torch.bool).tril(tail - queries)
        return right(self, window)

    monkeypatch.setattr(SequencePlan, "_build_mask", wrong)


def positions_off(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PagedModel._run

    def wrong(self: PagedModel, tokens: torch.Tensor, positions: torch.Tensor, *rest: Any) -> Any:
        return right(self, tokens, positions + (positions > 12), *rest)

    monkeypatch.setattr(PagedModel, "_run", wrong)


def commit_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVCache, "move", lambda self, source, target: None)


def write_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVCache, "write", lambda self, *args: None)


def pages_taken_for_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(cache: torch.Tensor, part: SequencePlan) -> torch.Tensor:
        first = part.first_slot if part.slots is None else int(part.slots[0])
        return torch.roll(cache, -first, 0)[: part.num_keys]

    monkeypatch.setattr(kernel, "_keys", wrong)


def heads_grouped_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(query: torch.Tensor, groups: int) -> torch.Tensor:
        return query.unflatten(1, (-1, groups)).permute(2, 1, 0, 3).flatten(1, 2)

    monkeypatch.setattr(kernel, "_stack_heads", wrong)


WRONG = {
    "siblings visible": ("llama", siblings_visible),
    "positions off": ("llama", positions_off),
    "learned positions off": ("gpt2", positions_off),
    "scaling ignored": ("gemma2", without(scaling=8**-0.5)),
    "scaling of its own ignored": ("granite", without(scaling=8**-0.5)),
    "window ignored": ("mistral", without("window")),
    "window ignored in some layers": ("gemma3_text", without("window")),
    "window one too wide": ("mistral", without(window=lambda w: w + 1)),
    "window one too narrow": ("gpt_oss", without(window=lambda w: w and w - 1)),
    "soft-cap ignored": ("gemma2", without("softcap")),
    "sinks ignored": ("gpt_oss", without("sinks_H")),
    "commit forgotten": ("llama", commit_forgotten),
    "write forgotten": ("llama", write_forgotten),
    "pages taken for one run": ("llama", pages_taken_for_one_run),
    "heads grouped the other way": ("llama", heads_grouped_the_other_way),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_attention_is_caught(fault, monkeypatch, cache_folder):
    architecture, breaks = WRONG[fault]
    model = make_model(architecture)
    breaks(monkeypatch)
    with pytest.raises(UnsupportedModelError, match=f"{type(model.model).__name__}'s own by .* is refused"):
        self_check(model)
    assert not list(cache_folder.rglob("*.json"))


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        (
            "llama4_text",
            {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 1, "attention_chunk_size": 8192},
        ),
        ("bert", {"num_key_value_heads": None}),
        ("diffllama", {}),
    ],
)
def test_attention_that_no_keyword_tells_of_is_refused(architecture, options):
    """Chunks and two-sided attention live in the mask alone; differential attention is not one softmax."""
    model = make_model(architecture, **options)
    with pytest.raises(UnsupportedModelError, match="differs from"):
        self_check(model)


def test_the_copy_is_small_and_keeps_every_kind_of_layer():
    wide = {"hidden_size": 512, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 512}
    model = make_model("gemma3_text", **wide, head_dim=16).model
    config = reduction.reduced_config(model)
    assert (config.num_hidden_layers, config.layer_types) == (6, model.config.layer_types[:6])
    assert (config.num_attention_heads, config.num_key_value_heads, config.hidden_size) == (8, 2, 128)
    assert (config.sliding_window, config.vocab_size, config.intermediate_size) == (5, 64, 64)
    small = next(reduction.reduced_copies(model))
    assert reduction.layer_kinds(small) == reduction.layer_kinds(model)
    assert model.config.num_hidden_layers == 12


def test_every_expert_of_the_copy_is_chosen():
    config = reduction.reduced_config(make_model("mixtral").model)
    assert config.num_local_experts == config.num_experts_per_tok == 2


def test_nothing_of_the_caller_changes():
    model = make_model()
    weights = {name: value.clone() for name, value in model.model.state_dict().items()}
    torch.manual_seed(0)
    before, threads, precision = torch.get_rng_state(), torch.get_num_threads(), torch.get_float32_matmul_precision()
    self_check(model)
    assert torch.equal(before, torch.get_rng_state())
    assert (threads, precision) == (torch.get_num_threads(), torch.get_float32_matmul_precision())
    assert model.model.config._attn_implementation == attention.ATTENTION_NAME
    assert all(torch.equal(weights[name], value) for name, value in model.model.state_dict().items())


def test_a_pass_is_remembered_until_something_changes(cache_folder, monkeypatch):
    self_check(make_model())
    (record,) = cache_folder.rglob("*.json")
    assert json.loads(record.read_text())["class"] == "LlamaForCausalLM"
    checked: list[str] = []
    monkeypatch.setattr(selfcheck, "_check_copy", lambda model, small: checked.append(model.name))
    renamed = make_model()
    renamed.model.config._name_or_path = "somewhere/else"
    self_check(renamed)
    assert not checked
    self_check(make_model(rms_norm_eps=1e-3))
    assert len(checked) == 1
    monkeypatch.setattr(passed.transformers, "__version__", "9.9")
    self_check(make_model())
    assert len(checked) == 2
    assert not list(cache_folder.rglob("*.tmp"))


def a_record() -> Path:
    record = passed.record_of(make_model(), "self_check", ["attention"])
    assert record is not None
    return record


def test_an_edited_kernel_is_checked_again(monkeypatch):
    first = a_record()
    read = passed.Path.read_bytes
    monkeypatch.setattr(passed.Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "reference.py"))
    assert a_record() != first


def test_an_unwritable_cache_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "file"))
    self_check(make_model())


def test_the_cache_folder_follows_the_desktop_standard(tmp_path, monkeypatch):
    monkeypatch.delenv("SPECDEC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert a_record().is_relative_to(tmp_path / "specdec")


@pytest.fixture
def no_copies(monkeypatch):
    monkeypatch.setattr(selfcheck, "reduced_copies", lambda model, seed=0: iter(()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_without_a_copy_the_model_itself_is_compared(architecture, dtype, no_copies):
    model = make_model(architecture, dtype)
    self_check(model)
    assert model.model.config._attn_implementation == attention.ATTENTION_NAME


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("breaks", [siblings_visible, commit_forgotten, write_forgotten, without(scaling=1.0)])
def test_without_a_copy_wrong_attention_is_caught(breaks, dtype, no_copies, monkeypatch):
    model = make_model("llama", dtype)
    breaks(monkeypatch)
    with pytest.raises(UnsupportedModelError, match="is refused"):
        self_check(model)
    assert model.model.config._attn_implementation == attention.ATTENTION_NAME


def test_without_a_copy_a_window_that_no_prompt_crosses_is_refused(no_copies):
    with pytest.raises(UnsupportedModelError, match=r"cannot be checked.*'sliding_window': 4096"):
        self_check(make_model("mistral"))
    self_check(make_model("mistral", sliding_window=6))
