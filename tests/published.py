"""Tiny random checkpoints in the layouts that Medusa, EAGLE, vLLM and speculators publish, and their forward passes.

Written from the published layouts alone: nothing here knows the networks that the tests compare with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import silu

VOCAB, HIDDEN, HEADS, KV_HEADS, SIZE, MLP, DRAFT, LAYERS = 97, 32, 4, 2, 8, 48, 23, 8
SETTINGS: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "max_position_embeddings": 64,
    "vocab_size": VOCAB,
}


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    return {name: (1 + tensor if "norm" in name else tensor).to(dtype) for name, tensor in drawn.items()}


def medusa(
    num_heads: int = 3,
    num_layers: int = 2,
    own_lm_head: bool = True,
    prefix: str = "",
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for head in range(num_heads):
        for block in range(num_layers):
            shapes[f"{prefix}{head}.{block}.linear.weight"] = (HIDDEN, HIDDEN)
            shapes[f"{prefix}{head}.{block}.linear.bias"] = (HIDDEN,)
        if own_lm_head:
            shapes[f"{prefix}{head}.{num_layers}.weight"] = (VOCAB, HIDDEN)
    config = {"base_model_name_or_path": "org/target", "medusa_num_heads": num_heads, "medusa_num_layers": num_layers}
    return random_tensors(shapes, 1, dtype), config


def _layer(prefix: str, inputs: int, hidden: int, norms: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}self_attn.q_proj.weight": (HEADS * SIZE, inputs),
        f"{prefix}self_attn.k_proj.weight": (KV_HEADS * SIZE, inputs),
        f"{prefix}self_attn.v_proj.weight": (KV_HEADS * SIZE, inputs),
        f"{prefix}self_attn.o_proj.weight": (hidden, HEADS * SIZE),
        f"{prefix}mlp.gate_proj.weight": (MLP, hidden),
        f"{prefix}mlp.up_proj.weight": (MLP, hidden),
        f"{prefix}mlp.down_proj.weight": (hidden, MLP),
    } | {f"{prefix}{norm}.weight": (hidden,) for norm in norms}


def eagle1(
    bias: bool = True, own_embedding: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    shapes = {"fc.weight": (HIDDEN, 2 * HIDDEN)} | _layer("layers.0.", HIDDEN, HIDDEN, ("post_attention_layernorm",))
    shapes |= {"fc.bias": (HIDDEN,)} if bias else {}
    shapes |= {"embed_tokens.weight": (VOCAB, HIDDEN)} if own_embedding else {}
    return random_tensors(shapes, 2, dtype), dict(SETTINGS)


def target_ids() -> Tensor:
    """Every fourth token of the vocabulary, from the third on."""
    return torch.arange(DRAFT) * 4 + 2


def eagle3(
    prefix: str = "midlayer.",
    hidden: int = HIDDEN,
    own_embedding: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A head for a target of width HIDDEN, itself `hidden` wide."""
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    shapes = {"fc.weight": (hidden, 3 * HIDDEN), "norm.weight": (hidden,), "lm_head.weight": (DRAFT, hidden)}
    shapes |= _layer(prefix, 2 * hidden, hidden, norms)
    shapes |= {"embed_tokens.weight": (VOCAB, hidden)} if own_embedding else {}
    tensors, ids = random_tensors(shapes, 3, dtype), target_ids()
    tensors["d2t"] = ids - torch.arange(DRAFT)
    tensors["t2d"] = torch.isin(torch.arange(VOCAB), ids)
    config = SETTINGS | {"draft_vocab_size": DRAFT, "hidden_size": hidden}
    return tensors, config | ({"target_hidden_size": HIDDEN, "head_dim": SIZE} if hidden != HIDDEN else {})


def speculators(
    norm_before_residual: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, settings = eagle3("layers.0.", own_embedding=True, dtype=dtype)
    outer = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 5}],
            "verifier": {"name_or_path": "org/target", "architectures": ["LlamaForCausalLM"]},
        },
        "draft_vocab_size": settings.pop("draft_vocab_size"),
        "norm_before_residual": norm_before_residual,
        "eagle_aux_hidden_state_layer_ids": [1, 4, 6],
        "tie_word_embeddings": False,
    }
    return tensors, outer | {"transformer_layer_config": settings}


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".safetensors"):
        save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def medusa_logits(tensors: dict[str, Tensor], hidden_TD: Tensor, lm_head_VD: Tensor | None = None) -> Tensor:
    """[heads, T, V] of three heads of two blocks."""
    rows = []
    for head in range(3):
        state = hidden_TD
        for block in range(2):
            weight, bias = tensors[f"{head}.{block}.linear.weight"], tensors[f"{head}.{block}.linear.bias"]
            state = state + silu(state @ weight.T + bias)
        rows.append(state @ (tensors[f"{head}.2.weight"] if lm_head_VD is None else lm_head_VD).T)
    return torch.stack(rows)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def _rotate(x_THE: Tensor, theta: float) -> Tensor:
    half = SIZE // 2
    angles = torch.arange(len(x_THE))[:, None, None] * theta ** (-torch.arange(half) / half)
    first, second = x_THE[..., :half], x_THE[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _attention(layer: dict[str, Tensor], read: Tensor, theta: float) -> Tensor:
    """Causal attention of one sequence, query by query and head by head."""
    query, key, value = (
        (read @ layer[f"self_attn.{one}_proj.weight"].T).unflatten(-1, (-1, SIZE)) for one in ("q", "k", "v")
    )
    query, key = _rotate(query, theta), _rotate(key, theta)
    out = torch.empty_like(query)
    for t in range(len(read)):
        for head in range(HEADS):
            group = head * KV_HEADS // HEADS
            weights = torch.softmax(key[: t + 1, group] @ query[t, head] / SIZE**0.5, 0)
            out[t, head] = weights @ value[: t + 1, group]
    return out.flatten(1) @ layer["self_attn.o_proj.weight"].T


def _mlp(layer: dict[str, Tensor], x: Tensor) -> Tensor:
    gate, up, down = (layer[f"mlp.{one}_proj.weight"] for one in ("gate", "up", "down"))
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def eagle1_logits(
    tensors: dict[str, Tensor], embeddings_TD: Tensor, features_TD: Tensor, lm_head_VD: Tensor, theta: float = 500.0
) -> Tensor:
    layer = {name.removeprefix("layers.0."): tensor for name, tensor in tensors.items()}
    state = torch.cat([embeddings_TD, features_TD], -1) @ tensors["fc.weight"].T + tensors.get("fc.bias", 0)
    state = state + _attention(layer, state, theta)
    state = state + _mlp(layer, _norm(state, layer["post_attention_layernorm.weight"]))
    return state @ lm_head_VD.T


def eagle3_logits(
    tensors: dict[str, Tensor],
    embeddings_TD: Tensor,
    features: list[Tensor],
    norm_before_residual: bool = False,
    theta: float = 500.0,
) -> Tensor:
    """Logits over the target's vocabulary, -inf for what the head cannot draft, by the published offsets."""
    layer = {name.removeprefix("midlayer.").removeprefix("layers.0."): tensor for name, tensor in tensors.items()}
    fused = torch.cat(features, -1) @ tensors["fc.weight"].T
    normed = _norm(fused, layer["hidden_norm.weight"])
    read = torch.cat([_norm(embeddings_TD, layer["input_layernorm.weight"]), normed], -1)
    state = (normed if norm_before_residual else fused) + _attention(layer, read, theta)
    state = state + _mlp(layer, _norm(state, layer["post_attention_layernorm.weight"]))
    draft = _norm(state, tensors["norm.weight"]) @ tensors["lm_head.weight"].T
    logits = torch.full((len(draft), VOCAB), -torch.inf)
    for draft_id in range(DRAFT):
        logits[:, draft_id + int(tensors["d2t"][draft_id])] = draft[:, draft_id]
    return logits
