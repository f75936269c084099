"""EAGLE heads written for EAGLE's own code, vLLM and speculators, and what each of them could not serve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from specdec.drafters.heads.eagle import EagleConfig
from specdec.drafters.heads.formats import layers, vocabulary
from specdec.drafters.heads.formats.eagle import IDS

# speculators' own default of `GreedyTokenProposalConfig`; vLLM drafts as many tokens unless told otherwise.
_SPECULATIVE_TOKENS = 5


def published_tensors(config: EagleConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's parameters under EAGLE's names; version 3 always has `d2t` and `t2d` (buffers of EAGLE's cnets.py)."""
    plain = {name: tensor for name, tensor in tensors.items() if name != IDS}
    if config.version == 1:
        return plain
    ids = tensors[IDS].cpu() if config.is_reduced else torch.arange(config.vocab_size)
    return plain | vocabulary.to_published(ids, config.vocab_size)


def write(
    config: EagleConfig, tensors: Mapping[str, Tensor], format: str, base_model: str | None, num_layers: int | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config.json; `num_layers` of the target, where known, bounds what the format's reader can capture.

    Raises ValueError where the format's reader would compute something else than this head does.
    """
    if reason := _refusal(config, format, num_layers):
        raise ValueError(f"format={format}: {reason}")
    dtype = str(tensors["fc.weight"].dtype).removeprefix("torch.")
    published = published_tensors(config, tensors)
    if format in ("vllm", "speculators") and config.version == 3:
        published = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in published.items()}
    if format == "speculators" and not config.is_reduced:
        published = {name: tensor for name, tensor in published.items() if name not in ("d2t", "t2d")}
    if format == "speculators":
        return published, _speculators(config, base_model, dtype)
    settings = _layer(config) | {"torch_dtype": dtype, "tie_word_embeddings": False}
    if config.version == 1:
        # EAGLE takes a missing `bias` for true (ea_model.py).
        settings |= {
            "architectures": [f"{'Eagle' if format == 'vllm' else ''}LlamaForCausalLM"],
            "bias": config.fc_bias,
        }
    else:
        settings |= {"architectures": ["LlamaForCausalLMEagle3"]} | _eagle3(config)
    return published, settings | ({} if base_model is None else {"base_model_name_or_path": base_model})


def _layer(config: EagleConfig) -> dict[str, Any]:
    """The decoder layer as a Llama config; rotary embedding in the old keys, which every reader knows."""
    scaling = {key: value for key, value in config.rope.items() if key != "rope_theta"}
    limit = {} if config.max_positions is None else {"max_position_embeddings": config.max_positions}
    return {
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "rms_norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "attention_bias": config.attention_bias,
        "mlp_bias": False,
        "rope_theta": config.rope["rope_theta"],
        "rope_scaling": None if scaling == {"rope_type": "default"} else scaling,
    } | limit


def _eagle3(config: EagleConfig) -> dict[str, Any]:
    width = {"target_hidden_size": config.target_hidden_size}
    return {
        "draft_vocab_size": config.draft_vocab_size,
        "norm_before_residual": config.norm_before_residual,
        # Inputs of layers, as `layers.CONVENTIONS` has it; the index of a hidden state is the same number.
        layers.KEY: [*config.feature_layers],
        # EAGLE's code takes the mere presence of the key for an embedding of the head's own.
    } | (width if config.target_hidden_size != config.hidden_size else {})


def _speculators(config: EagleConfig, base_model: str | None, dtype: str) -> dict[str, Any]:
    method = {"proposal_type": "greedy", "speculative_tokens": _SPECULATIVE_TOKENS}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [method],
            "verifier": {"name_or_path": base_model, "architectures": []},
        },
        "transformer_layer_config": _layer(config),
        "torch_dtype": dtype,
        "tie_word_embeddings": False,
    } | _eagle3(config)


def _refusal(config: EagleConfig, format: str, num_layers: int | None) -> str | None:
    """Why the format's reader would not compute what this head does."""
    own_code = format in ("eagle", "eagle3")
    if config.version == 1:
        if config.has_own_lm_head:
            return "its readers end an EAGLE-1 head in the target's LM head; this head has one of its own"
        if config.fc_bias and format == "vllm":
            return "vLLM builds fc without a bias and would drop this head's (llama_eagle.py)"
        return "EAGLE's code has no bias in its attention" if config.attention_bias and own_code else None
    if not config.has_own_lm_head:
        return "its readers expect an LM head of the head's own"
    if config.fc_bias:
        return "its readers build fc without a bias"
    if len(config.feature_layers) != 3:
        return f"its readers take three hidden states, this head {len(config.feature_layers)}"
    if num_layers is not None and max(config.feature_layers) >= num_layers:
        return f"layer ids mean states before the target's final norm; this head reads the one behind it ({num_layers})"
    if own_code and config.norm_before_residual:
        return "EAGLE's code adds the state before hidden_norm to the attention's output; use vllm or speculators"
    if own_code and config.attention_bias:
        return "EAGLE's code has no bias in its attention; use vllm or speculators"
    usual = None if num_layers is None else EagleConfig.default_layers(3, num_layers)
    if own_code and usual is not None and config.feature_layers != usual:
        return (
            f"EAGLE's code reads the hidden states {usual}, this head {config.feature_layers}; use vllm or speculators"
        )
    return None
