"""Medusa heads in files: `{head}.{block}.linear.weight` as published, `blocks.{head}.layers.{block}.weight` in vLLM."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from specdec.checkpoint import Checkpoint
from specdec.drafters.heads.formats.description import Description, Options, empty_head
from specdec.drafters.heads.formats.findings import Findings
from specdec.drafters.heads.medusa import MedusaConfig

# FasterDecoding/Medusa, medusa_model.py: the state dict of a list of heads; Medusa's own whole model calls that list
# `medusa_head`, vLLM takes `medusa_heads` off.
_PREFIX = r"(?:medusa_heads?\.)?"
_PUBLISHED = re.compile(_PREFIX + r"(\d+)\.(\d+)\.(?:linear\.(?:weight|bias)|weight)")
# vllm/model_executor/models/medusa.py
_VLLM_BLOCK = re.compile(_PREFIX + r"blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)")
_VLLM_HEAD = re.compile(_PREFIX + r"lm_heads\.(\d+)\.weight")


def is_medusa(names: Mapping[str, Tensor]) -> bool:
    return any(_PUBLISHED.fullmatch(name) or _VLLM_BLOCK.fullmatch(name) for name in names)


def read(checkpoint: Checkpoint, options: Options) -> Description:
    """Sizes come from the tensors; of config.json only what they do not tell is believed.

    The published config of medusa-vicuna-7b-v1.3 names two heads where the file holds five, so more heads than it names
    are a note, fewer a problem.
    """
    findings, config = Findings(), checkpoint.config
    is_vllm = any(_VLLM_BLOCK.fullmatch(name) for name in checkpoint.tensors)
    blocks = [found for name in checkpoint.tensors if (found := _block(name))]
    num_layers = findings.agree(
        "number of residual blocks",
        {
            "the tensors": 1 + max((block for _, block in blocks), default=-1) or None,
            "config.json": findings.integer(config, "num_hidden_layers" if is_vllm else "medusa_num_layers"),
        },
    )
    canonical = {name: _to_published(name, num_layers) for name in checkpoint.tensors}
    tensors = {canonical[name]: tensor for name, tensor in checkpoint.tensors.items()}
    found_heads = 1 + max((head for head, _ in blocks), default=-1)
    told_heads = findings.integer(config, "num_heads" if is_vllm else "medusa_num_heads") or found_heads
    if told_heads < found_heads:
        findings.notes.append(f"config.json names {told_heads} heads, the file holds {found_heads}")
    lm_heads = [name for name in tensors if name.endswith(f".{num_layers}.weight")]
    vocab_size = len(tensors[lm_heads[0]]) if lm_heads else findings.integer(config, "vocab_size")
    if vocab_size is None and options.target is not None:
        vocab_size = options.target.vocab_size
    if vocab_size is None:
        findings.unknown.append("vocab_size")
    weight = tensors.get("0.0.linear.weight")
    sizes = {
        "0.0.linear.weight": None if weight is None else len(weight),
        "config.json": findings.integer(config, "hidden_size"),
    }
    base_model = config.get("base_model_name_or_path")
    shape = None
    try:
        shape = MedusaConfig(
            hidden_size=findings.agree("hidden size", sizes),
            vocab_size=vocab_size or 1,
            num_heads=max(found_heads, told_heads),
            num_layers=num_layers,
            has_own_lm_head=bool(lm_heads),
        )
        in_file = {published: name for name, published in canonical.items()}
        findings.compare(empty_head(shape).state_dict(), tensors, lambda name: in_file.get(name, name))
    except ValueError as error:
        findings.refuse(error)
    return Description("vllm" if is_vllm else "medusa", "medusa", shape, tensors, findings, base_model)


def write(
    config: MedusaConfig, tensors: Mapping[str, Tensor], format: str, base_model: str | None
) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Tensors, config.json and name of the weight file. Raises ValueError for what vLLM cannot serve."""
    settings: dict[str, Any]
    if format == "medusa":
        settings = {
            "base_model_name_or_path": base_model,
            "medusa_num_heads": config.num_heads,
            "medusa_num_layers": config.num_layers,
            # Not published, but heads without LM heads of their own do not show the vocabulary.
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
        }
        return dict(tensors), settings, "medusa_lm_head.safetensors"
    if not config.has_own_lm_head:
        raise ValueError("vLLM loads no Medusa heads that end in the target's LM head; use format=medusa or specdec")
    settings = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "num_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "medusa_fc_bias": True,
        "base_model_name_or_path": base_model,
    }
    names = {name: _to_vllm(name, config.num_layers) for name in tensors}
    return {names[name]: tensor for name, tensor in tensors.items()}, settings, "model.safetensors"


def _block(name: str) -> tuple[int, int] | None:
    """Head and block that a residual block's tensor belongs to."""
    found = _VLLM_BLOCK.fullmatch(name) or (_PUBLISHED.fullmatch(name) if ".linear." in name else None)
    return (int(found[1]), int(found[2])) if found else None


def _to_published(name: str, num_layers: int) -> str:
    """The published name without its prefix; a name of no known form stays."""
    if found := _VLLM_BLOCK.fullmatch(name):
        return f"{found[1]}.{found[2]}.linear.{found[3]}"
    if found := _VLLM_HEAD.fullmatch(name):
        return f"{found[1]}.{num_layers}.weight"
    return re.sub(f"^{_PREFIX}", "", name) if _PUBLISHED.fullmatch(name) else name


def _to_vllm(name: str, num_layers: int) -> str:
    head, block, *rest = name.split(".")
    return f"blocks.{head}.layers.{block}.{rest[-1]}" if int(block) < num_layers else f"lm_heads.{head}.weight"
