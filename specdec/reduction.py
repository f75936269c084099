"""A small random copy of a model that keeps every kind of attention layer: what the self-check runs on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

VOCAB_SIZE = 64
WINDOW = 5
SOFTCAP = 2.0
SEED = 20250101

_INNER_SIZES = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "intermediate_size_mlp",
    "ffn_dim",
    "ffn_hidden_size",
    "expert_ffn_hidden_size",
    "n_inner",
    "mlp_dim",
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN_EXPERTS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_top_k",
    "moe_topk",
    "moe_k",
)
_EXPERT_GROUPS = ("n_group", "topk_group")
_REACHES = ("sliding_window", "sliding_window_size", "attention_window", "attention_chunk_size", "index_topk")


def attention_reaches(config: PreTrainedConfig) -> dict[str, int]:
    """The attributes of a text config that bound how far back, or how much, its attention looks."""
    named = {name: getattr(config, name, None) for name in _REACHES}
    return {name: value for name, value in named.items() if _is_count(value)}


def layer_kinds(model: nn.Module, num_layers: int | None = None) -> set[tuple[Any, ...]]:
    """What tells the layers' attention modules apart, sizes left out; of the first `num_layers` layers or of all."""
    kinds = set()
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int) or (num_layers is not None and layer >= num_layers):
            continue
        traits = {
            name: type(value).__name__ if _is_number(value) else value
            for name, value in vars(module).items()
            if name not in ("layer_idx", "training")
            and not name.startswith("_")
            and (value is None or isinstance(value, bool | int | float | str))
        }
        children = tuple((name, type(child).__name__) for name, child in module.named_children())
        kinds.add((type(module).__name__, tuple(sorted(traits.items(), key=str)), children))
    return kinds


def reduced_copies(model: PreTrainedModel, seed: int = SEED) -> Iterator[PreTrainedModel]:
    """Copies of `model` with random float32 parameters, the smallest first; none where it cannot be rebuilt smaller.

    Layers: the first few, at least two, with every kind of layer among them. Hidden size, heads (with their ratio),
    vocabulary, feed-forward and experts shrink; windows, chunks and soft-caps narrow so that a short prompt feels them.
    Every expert is chosen, so that no rounding can change the routing. The global random state is left alone.
    """
    wanted = layer_kinds(model)
    for with_heads in (True, False):
        try:
            with torch.random.fork_rng(devices=[]), _no_warnings():
                config = reduced_config(model, with_heads)
                small = type(model)._from_config(config, dtype=torch.float32, attn_implementation="eager")
                randomize(small, seed)
                small = small.to(model.device).eval().requires_grad_(False)
        except Exception:  # any architecture may come here; the self-check then says what remains possible
            continue
        if layer_kinds(small) >= wanted:
            yield small


def reduced_config(model: PreTrainedModel, with_heads: bool = True) -> PreTrainedConfig:
    """The config of a reduced copy; `with_heads` also shrinks the hidden size and the number of heads."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    num_layers = text.num_hidden_layers
    keep = _num_layers_to_keep(model, text)
    shared = getattr(text, "num_kv_shared_layers", 0) or 0
    # Layers that borrow keys follow those that make them; of the latter the last ones of a kind are set apart.
    order = list(range(keep)) * (3 if shared else 1)
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == num_layers:
            setattr(text, name, type(value)(value[layer] for layer in order))
    text.num_hidden_layers = len(order)
    if shared:
        text.num_kv_shared_layers = keep
    for part in _parts(config):
        _narrow(part)
        if part is not text and part is not config and _is_count(getattr(part, "num_hidden_layers", None)):
            part.num_hidden_layers = min(2, part.num_hidden_layers)
    if with_heads:
        _shrink_heads(text)
    return config


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Fresh parameters at a scale where attention is neither flat nor one-hot, from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        fresh = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            fresh *= 1.5 * parameter.shape[-1] ** -0.5
        elif name.endswith(("weight", "scale")):
            fresh = 1 + 0.1 * fresh
        else:
            fresh *= 0.5
        parameter.copy_(fresh)


def _num_layers_to_keep(model: PreTrainedModel, text: PreTrainedConfig) -> int:
    """Length of the shortest prefix, at least two, that holds every kind of layer."""
    num_layers: int = text.num_hidden_layers
    listed = [list(map(str, v)) for v in vars(text).values() if isinstance(v, list | tuple) and len(v) == num_layers]
    # Names, flags and few numbers are kinds; fractions and a width for every layer are not.
    listed = [values for values in listed if len(set(values)) <= 4 and not any("." in value for value in values)]
    # Layers that borrow keys come last and are repeated behind the prefix, so the lists must say it all.
    wanted = set() if getattr(text, "num_kv_shared_layers", 0) else layer_kinds(model)
    for keep in range(2, num_layers):
        if all(set(values[:keep]) == set(values) for values in listed) and layer_kinds(model, keep) >= wanted:
            return keep
    return num_layers


def _narrow(config: PreTrainedConfig) -> None:
    """Makes one config (of the text model or of another part) small, windows, chunks and caps tight."""

    def put(names: tuple[str, ...], value: float) -> None:
        for name in names:
            old = getattr(config, name, None)
            if isinstance(old, list | tuple) and old and all(map(_is_number, old)):
                setattr(config, name, type(old)(value for _ in old))
            elif _is_number(old) and old > value:
                setattr(config, name, value)

    for name in [name for name in vars(config) if name.endswith("token_id") and _is_number(getattr(config, name))]:
        setattr(config, name, getattr(config, name) % 3)
    put(("vocab_size", "vocab_size_per_layer_input"), VOCAB_SIZE)
    put(_INNER_SIZES, 64)
    put((*_EXPERTS, *_CHOSEN_EXPERTS), 2)
    for name in _CHOSEN_EXPERTS:
        if getattr(config, name, None) == 1 and any(getattr(config, experts, None) == 2 for experts in _EXPERTS):
            setattr(config, name, 2)
    put(_EXPERT_GROUPS, 1)
    put(_REACHES, WINDOW)
    put(("attn_logit_softcapping",), SOFTCAP)
    # Positions from which queries are scaled up; a short prompt must reach them.
    put(("floor_scale",), 4)
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *(value for value in ropes.values() if isinstance(value, dict))):
        if rope.get("llama_4_scaling_beta"):
            rope["original_max_position_embeddings"] = 4
    # Set where a checkpoint is quantized; the copy is not.
    if hasattr(config, "quantization_config"):
        del config.quantization_config


def _shrink_heads(text: PreTrainedConfig) -> None:
    heads, hidden = text.num_attention_heads, text.hidden_size
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if not (_is_count(heads) and _is_count(kv_heads)) or hidden % heads or heads % kv_heads:
        return
    kept = min(kv_heads, 2)
    fewer = kept * (heads // kv_heads)
    if _is_count(getattr(text, "num_key_value_heads", None)):
        text.num_key_value_heads = kept
    text.num_attention_heads = fewer
    text.hidden_size = hidden // heads * fewer
    for name in ("word_embed_proj_dim", "embedding_size"):
        if getattr(text, name, None) == hidden:
            setattr(text, name, text.hidden_size)


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Transformers warns about settings that only the copy has; nobody chose them."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
