"""EAGLE heads read from files: names and sizes of EAGLE-1, EAGLE-2 and EAGLE-3 as EAGLE, vLLM and speculators write them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

from specdec.checkpoint import Checkpoint
from specdec.drafters.heads.eagle import EagleConfig
from specdec.drafters.heads.formats import layers, vocabulary
from specdec.drafters.heads.formats.description import Description, Options, empty_head
from specdec.drafters.heads.formats.findings import Findings

IDS = "draft_to_target_R"
# Not the head's: copies of the target's that speculators trains with, and tables that follow from config.json.
_IDLE = re.compile(r"verifier_(?:norm|lm_head)\.weight|.*rotary_emb\.inv_freq")
# They change what a head computes and have no counterpart in the network here.
_FOREIGN = ("norm_before_fc", "fc_norm", "norm_output", "parallel_drafting", "add_para_norm", "mlp_bias")


def is_eagle(names: Mapping[str, Tensor]) -> bool:
    return "fc.weight" in names or any(name.startswith(("midlayer.", "layers.0.self_attn.")) for name in names)


def read(checkpoint: Checkpoint, options: Options) -> Description:
    """Sizes come from the tensors and must agree with config.json; what tensors do not show comes from config.json."""
    findings = Findings()
    format, settings, base_model = _settings(checkpoint.config, findings)
    idle = sorted(name for name in checkpoint.tensors if _IDLE.fullmatch(name))
    if idle:
        findings.notes.append(f"left out, not the head's: {', '.join(idle)}")
    names = [name for name in checkpoint.tensors if name not in idle]
    is_3 = format == "speculators" or any(name.startswith("midlayer.") or "hidden_norm" in name for name in names)
    is_3 = is_3 or "d2t" in names
    prefix = "midlayer." if any(name.startswith("midlayer.") for name in names) else "layers.0."
    if not format:
        format = "eagle" if not is_3 else "eagle3" if prefix == "midlayer." else "vllm"
    own = "midlayer." if is_3 else "layers.0."
    tensors = {own + n[len(prefix) :] if n.startswith(prefix) else n: checkpoint.tensors[n] for n in names}
    d2t, t2d = tensors.pop("d2t", None), tensors.pop("t2d", None)
    if is_3 and t2d is not None and d2t is None:
        findings.problems.append("missing tensors: d2t, and t2d is there")
    try:
        config = _config(3 if is_3 else 1, format, settings, tensors, t2d, options, findings)
        expected = empty_head(config).state_dict()
    except (ValueError, TypeError, KeyError) as error:
        findings.refuse(error)
        return Description(format, "eagle3" if is_3 else "eagle1", None, tensors, findings, base_model)
    if d2t is not None:
        ids = vocabulary.to_target_ids(d2t, t2d, config.vocab_size, findings)
        # The whole vocabulary needs no ids: ascending and in range, they are 0, 1, 2, ...
        tensors |= {IDS: ids} if config.is_reduced else {}
    findings.compare(
        expected, tensors, lambda n: "d2t" if n == IDS else prefix + n[len(own) :] if n.startswith(own) else n
    )
    return Description(format, "eagle3" if is_3 else "eagle1", config, tensors, findings, base_model)


def _settings(config: Mapping[str, Any], findings: Findings) -> tuple[str, dict[str, Any], str | None]:
    """The format where config.json names it, what it says in one level, and the target's name."""
    if "speculators_model_type" not in config:
        return "", dict(config), config.get("base_model_name_or_path")
    if config["speculators_model_type"] != "eagle3":
        kind = config["speculators_model_type"]
        findings.problems.append(f"speculators_model_type={kind!r} is not read here; eagle3 is")
    layer = config.get("transformer_layer_config") or {}
    verifier = (config.get("speculators_config") or {}).get("verifier") or {}
    # model_type on top is that of the whole; the layer's own stays.
    outer = {key: value for key, value in config.items() if key not in ("transformer_layer_config", "model_type")}
    return "speculators", {**layer, **outer}, verifier.get("name_or_path")


def _config(
    version: int,
    format: str,
    settings: dict[str, Any],
    tensors: Mapping[str, Tensor],
    t2d: Tensor | None,
    options: Options,
    findings: Findings,
) -> EagleConfig:
    layer = "midlayer." if version == 3 else "layers.0."

    def size(name: str, dim: int = 0) -> int | None:
        tensor = tensors.get(name)
        return tensor.shape[dim] if tensor is not None and tensor.ndim > dim else None

    def integer(key: str) -> int | None:
        return findings.integer(settings, key)

    def agree(what: str, key: str, name: str, dim: int = 0) -> int:
        return findings.agree(what, {name: size(name, dim), f"{key} in config.json": integer(key)})

    hidden = agree("hidden size", "hidden_size", "fc.weight")
    heads = integer("num_attention_heads") or 0
    if not heads:
        findings.problems.append("nothing tells the number of heads: no num_attention_heads in config.json")
    queries, keys = size(f"{layer}self_attn.q_proj.weight"), size(f"{layer}self_attn.k_proj.weight")
    by_tensor = queries // heads if queries and heads else None
    default_size = integer("head_dim") or (hidden // heads if heads and not by_tensor else None)
    head_size = findings.agree("head size", {"q_proj.weight": by_tensor, "head_dim in config.json": default_size})
    kv_heads = {
        "k_proj.weight": keys // head_size if keys else None,
        "num_key_value_heads in config.json": integer("num_key_value_heads"),
    }
    told_vocab = {
        "embed_tokens.weight": size("embed_tokens.weight"),
        "t2d": None if t2d is None else len(t2d),
        "vocab_size in config.json": integer("vocab_size"),
    }
    vocab_size = findings.agree("vocabulary", told_vocab)
    eps: Any = settings.get("rms_norm_eps")
    if type(eps) not in (int, float) or eps <= 0:
        findings.problems.append(f"rms_norm_eps={eps!r} in config.json is no positive number")
        eps = 1.0
    if (act := settings.get("hidden_act", "silu")) != "silu":
        findings.problems.append(f"hidden_act={act!r} is not served; silu is")
    if foreign := [key for key in _FOREIGN if settings.get(key)]:
        findings.problems.append(f"{', '.join(foreign)} in config.json: heads of this kind are not served")
    num_layers = None if options.target is None else options.target.num_layers
    features = layers.feature_layers(settings, version, num_layers, options.layer_ids, findings)
    before = options.norm_before_residual
    if before is None and format == "speculators" and "norm_before_residual" not in settings:
        findings.problems.append(
            "norm_before_residual is not in config.json, and speculators and vLLM assume different values: "
            "give norm_before_residual=true or false"
        )
    lm_head, has_own_embedding = "lm_head.weight", "embed_tokens.weight" in tensors
    inputs = size("fc.weight", 1)
    return EagleConfig(
        version=version,
        hidden_size=hidden,
        target_hidden_size=_target_size(version, hidden, inputs, len(features), has_own_embedding, settings, findings),
        intermediate_size=agree("MLP size", "intermediate_size", f"{layer}mlp.gate_proj.weight"),
        num_heads=max(heads, 1),
        num_kv_heads=findings.agree("number of key heads", kv_heads),
        head_size=head_size,
        rms_norm_eps=float(eps),
        vocab_size=vocab_size,
        draft_vocab_size=vocab_size if version == 1 else agree("draft vocabulary", "draft_vocab_size", lm_head),
        feature_layers=features,
        rope=_rope(settings),
        fc_bias="fc.bias" in tensors,
        attention_bias=f"{layer}self_attn.q_proj.bias" in tensors,
        norm_before_residual=bool(settings.get("norm_before_residual", False) if before is None else before),
        has_own_embedding=has_own_embedding,
        has_own_lm_head=version == 3 or lm_head in tensors,
        max_positions=integer("max_position_embeddings"),
    )


def _target_size(
    version: int,
    hidden: int,
    inputs: int | None,
    num_features: int,
    has_own_embedding: bool,
    settings: Mapping[str, Any],
    findings: Findings,
) -> int:
    """The width of what `fc` reads; version 1 reads features of the head's own width."""
    if version == 1:
        return hidden
    if inputs is not None and inputs % num_features:
        findings.problems.append(f"fc.weight reads {inputs} numbers, no multiple of {num_features} hidden states")
        return hidden
    told = {
        "hidden_size, for want of an embedding of its own": None if has_own_embedding else hidden,
        f"fc.weight, of {num_features} hidden states": None if inputs is None else inputs // num_features,
        "target_hidden_size in config.json": findings.integer(settings, "target_hidden_size"),
    }
    return findings.agree("target's hidden size", told)


def _rope(settings: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' `rope_parameters` of old (`rope_theta`, `rope_scaling`) or new keys; EAGLE's default base is 10000."""
    rope = dict(settings.get("rope_scaling") or settings.get("rope_parameters") or {})
    kind = rope.pop("type", None)
    rope.setdefault("rope_type", kind or "default")
    rope.setdefault("rope_theta", settings.get("rope_theta") or 10000.0)
    try:
        LlamaRotaryEmbedding(LlamaConfig(rope_parameters=dict(rope)))
    except KeyError as error:
        raise ValueError(f"rotary embedding {rope} is unknown or lacks something ({error})") from error
    return rope
