"""The attention function that transformers calls: any model that dispatches attention by name runs over pages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from specdec.kernels.tree_attention import AttentionPlan, tree_attention
from specdec.kv_cache import KVCache, LayerShape

ATTENTION_NAME = "specdec_paged"


class UnsupportedModelError(ValueError):
    """A model whose attention cannot be served exactly; it is refused rather than run wrong."""


@dataclass(frozen=True)
class LayerOptions:
    """What a layer asks of its attention: the factor of its scores, how many positions it sees, whatever else it wants."""

    scaling: float
    window: int | None
    has_softcap: bool
    has_sinks: bool


@dataclass
class TreeContext:
    """Travels as the keyword `tree_context` from `PagedModel.forward` to every attention layer.

    `is_invariant` asks for attention whose bits depend on a token's own path alone. Without a cache the context only
    records each layer's K/V shape (`shapes`) and what it asks for (`options`), which is how a model is measured.
    """

    plan: AttentionPlan
    cache: KVCache | None
    is_invariant: bool = False
    shapes: dict[int, LayerShape] = field(default_factory=dict)
    options: dict[int, LayerOptions] = field(default_factory=dict)


def register() -> None:
    """Makes `attn_implementation="specdec_paged"` known to transformers; no mask function, so models build no masks."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    tree_context: TreeContext | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """Writes the layer's new keys and values to their slots, then attends; heads-first in, [1, T, H, E] out.

    Keywords that it does not know are left to the self-check, which compares with the model's own attention.
    """
    name = type(module).__name__
    if tree_context is None:
        raise UnsupportedModelError(f"{name} does not hand the keyword tree_context down to its attention")
    layer = getattr(module, "layer_idx", None)
    if layer is None or query.shape[0] != 1 or attention_mask is not None:
        raise UnsupportedModelError(f"{name} (layer {layer}) does not attend over one packed row without a mask")
    query_THE, key_TGE, value_TGE = (states[0].transpose(0, 1) for states in (query, key, value))
    scaling = query_THE.shape[-1] ** -0.5 if scaling is None else scaling
    if tree_context.cache is None:
        tree_context.options[layer] = LayerOptions(scaling, sliding_window, softcap is not None, s_aux is not None)
        tree_context.shapes[layer] = LayerShape(key_TGE.shape[1], key_TGE.shape[2], value_TGE.shape[2])
        return query_THE.new_zeros(1, *query_THE.shape[:2], value_TGE.shape[2]), None
    plan, cache = tree_context.plan, tree_context.cache
    cache.write(layer, plan.slots_T, plan.first_slot, key_TGE, value_TGE)
    keys_SGE, values_SGE = cache.layer(layer)
    out_THE = tree_attention(
        query_THE,
        keys_SGE,
        values_SGE,
        plan,
        scaling=scaling,
        window=sliding_window,
        softcap=softcap,
        sinks_H=s_aux,
        is_invariant=tree_context.is_invariant,
    )
    return out_THE[None], None
