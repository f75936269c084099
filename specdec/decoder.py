"""The quick way through a packed model on the CPU: all decoder layers in one call, for models built as Llama is."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.attention import LayerOptions
from specdec.interfaces import ForwardResult
from specdec.kernels.cpu import BlockedWeight, DecoderLayer, DecoderStack, StackShape, norm
from specdec.kernels.tree_attention import AttentionPlan
from specdec.kv_cache import KVCache
from specdec.packing import PackedLinear

# Model types whose layers are what `DecoderStack` computes; what their configs can change is looked at below.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_TABLE_STEP = 2048


class NotServed(ValueError):
    """Why a model goes the way of transformers, layer by layer; that is slower, not wrong."""


class FastDecoder:
    """Runs a packed model without its modules; `options` is what each layer asks of its attention.

    Raises NotServed where the model is not of the kind that the stack computes.
    A token's bits depend on its own path alone, so numerics=invariant costs nothing here.
    """

    def __init__(self, model: PreTrainedModel, options: Seq[LayerOptions]) -> None:
        config: Any = model.config.get_text_config(decoder=True)
        if config.model_type not in MODEL_TYPES:
            raise NotServed(f"model type {config.model_type} is none of {', '.join(MODEL_TYPES)}")
        _require_plain(config)
        base: Any = model.get_decoder()
        heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        if len({one.scaling for one in options}) != 1 or any(one.has_softcap or one.has_sinks for one in options):
            raise NotServed("its attention has a softcap, sinks, or another scaling in each layer")
        shape = StackShape(
            config.hidden_size,
            heads,
            config.num_key_value_heads,
            head_size,
            config.rms_norm_eps,
            options[0].scaling,
        )
        try:
            self._stack = DecoderStack(
                shape, [_layer(layer, one.window) for layer, one in zip(base.layers, options, strict=True)]
            )
        except ValueError as error:
            raise NotServed(str(error)) from error
        self._embedding, self._rotary, self._norm = base.embed_tokens, base.rotary_emb, base.norm
        self._lm_head, self._eps = model.get_output_embeddings(), config.rms_norm_eps
        self._num_layers = len(base.layers)
        self._cos_PE = self._sin_PE = torch.empty(0, head_size)

    def forward(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        plan: AttentionPlan,
        cache: KVCache,
        wanted_rows_R: Tensor,
        hidden_layers: Seq[int],
    ) -> ForwardResult:
        """See `PagedModel.forward`."""
        embedded_TD = self._embedding(token_ids_T)
        self._reach(int(positions_T.max()) + 1)
        last = self._num_layers
        inner = [layer - 1 for layer in hidden_layers if 0 < layer < last]
        keys, values = cache.addresses()
        # Asked for the last states of all, the stack has none to leave out.
        rows_R = None if last in hidden_layers else wanted_rows_R
        out, found = self._stack.run(
            embedded_TD, positions_T, plan, self._cos_PE, self._sin_PE, keys, values, inner, rows_R=rows_R
        )
        normed_RD = norm(out, wanted_rows_R if rows_R is None else None, self._norm.weight, self._eps)
        hidden = {layer + 1: states for layer, states in found.items()}
        if 0 in hidden_layers:
            hidden[0] = embedded_TD
        if last in hidden_layers:
            hidden[last] = norm(out, None, self._norm.weight, self._eps)
        return ForwardResult(self._lm_head(normed_RD), hidden)

    def _reach(self, num_positions: int) -> None:
        """Cosines and sines up to `num_positions`, as the model's own module computes them."""
        if num_positions > len(self._cos_PE):
            positions = torch.arange(-(-num_positions // _TABLE_STEP) * _TABLE_STEP)
            cos, sin = self._rotary(self._norm.weight, positions[None])
            self._cos_PE, self._sin_PE = cos[0].contiguous(), sin[0].contiguous()


def _require_plain(config: Any) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in rope.values()) or rope.get("rope_type") in ("dynamic", "longrope"):
        raise NotServed(f"its rotary embedding ({rope}) is not one table for all layers and lengths")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise NotServed("its rotary embedding turns a part of each head")
    if config.hidden_act != "silu":
        raise NotServed(f"its activation is {config.hidden_act}, not silu")


def _layer(layer: Any, window: int | None) -> DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = joined_weight(attention.q_proj, attention.k_proj, attention.v_proj)
    return DecoderLayer(
        layer.input_layernorm.weight,
        qkv,
        joined_weight(attention.o_proj),
        layer.post_attention_layernorm.weight,
        joined_weight(mlp.gate_proj, mlp.up_proj),
        joined_weight(mlp.down_proj),
        attention.q_norm.weight if hasattr(attention, "q_norm") else None,
        attention.k_norm.weight if hasattr(attention, "k_norm") else None,
        window,
    )


def joined_weight(*linears: Any) -> BlockedWeight:
    """The weight that these packed layers share, in this order. Raises NotServed where they do not."""
    first = linears[0]
    if not all(isinstance(one, PackedLinear) and one.product is first.product for one in linears):
        raise NotServed("its linear layers are not packed together")
    if [one.index for one in linears] != list(range(len(first.product.sizes))):
        raise NotServed("its linear layers are packed in another order")
    weight = first.product.weight
    if not isinstance(weight, BlockedWeight):
        raise NotServed("its weights are not in blocks")
    return weight
