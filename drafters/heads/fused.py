"""The quick way through an EAGLE head on the CPU: its layer in one call, and whole confidence trees in another."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor, nn

from specdec.decoder import NotServed, joined_weight
from specdec.drafters.heads.eagle import EagleHead
from specdec.kernels.cpu import (
    DecoderLayer,
    DecoderStack,
    GrowingRoot,
    GrownTrees,
    StackShape,
    TreeGrower,
    can_run,
    norm,
    padded_rows,
)
from specdec.kernels.tree_attention import AttentionPlan
from specdec.kv_cache import KVCache


class FusedEagle:
    """The layer of a packed head over pages, rounded as the head itself rounds.

    Raises NotServed where head or CPU are not such that the kernels do it.
    """

    def __init__(self, head: EagleHead) -> None:
        if not can_run():
            raise NotServed("this machine has no C++ kernels")
        config = head.config
        self._head, self._eps = head, config.rms_norm_eps
        layer: Any = head.midlayer if config.version == 3 else head.layers[0]
        attention, mlp = layer.self_attn, layer.mlp
        self.layer = layer
        weights = DecoderLayer(
            None,
            joined_weight(attention.q_proj, attention.k_proj, attention.v_proj),
            joined_weight(attention.o_proj),
            layer.post_attention_layernorm.weight,
            joined_weight(mlp.gate_proj, mlp.up_proj),
            joined_weight(mlp.down_proj),
        )
        size = config.head_size
        shape = StackShape(config.hidden_size, config.num_heads, config.num_kv_heads, size, self._eps, size**-0.5)
        try:
            self.stack = DecoderStack(shape, [weights])
        except ValueError as error:
            raise NotServed(str(error)) from error

    def run(
        self,
        embeddings_TD: Tensor,
        features_TD: Tensor,
        positions_T: Tensor,
        plan: AttentionPlan,
        cache: KVCache,
        rows_R: Tensor | None = None,
    ) -> Tensor:
        """See `EagleHead.forward`, of the packed rows `rows_R` (None: all); the layer's keys and values of every row are in the
        cache afterwards."""
        count, size = embeddings_TD.shape
        cos_PE, sin_PE = self._head.rotation_table(int(positions_T.max()) + 1, features_TD)
        if self._head.config.version == 3:
            # Both normed, side by side.
            read_TX, residual_TD = padded_rows(count, 2 * size), features_TD
            norm(embeddings_TD, None, self.layer.input_layernorm.weight, self._eps, read_TX[:, :size])
            normed = norm(features_TD, None, self.layer.hidden_norm.weight, self._eps, read_TX[:, size:])
            if self._head.config.norm_before_residual:
                residual_TD = normed[:count]
        else:
            read_TX = padded_rows(count, size)
            residual_TD = self._head.fc(torch.cat([embeddings_TD, features_TD], -1))
            read_TX[:count] = residual_TD
        keys, values = cache.addresses()
        return self.stack.run(
            residual_TD, positions_T, plan, cos_PE, sin_PE, keys, values, read_TX=read_TX, rows_R=rows_R
        )[0]


class FusedGrowth:
    """Confidence trees of a packed head, grown in one call with its `layer`, and with the embedding, LM head and tokens of
    its outputs that it drafts with.

    Raises NotServed where these are not such that the kernels do it.
    """

    def __init__(
        self, head: EagleHead, layer: FusedEagle, embedding: nn.Module, lm_head: nn.Module, ids_R: Tensor | None
    ) -> None:
        if type(embedding) is not nn.Embedding or embedding.weight.dtype != torch.bfloat16:
            raise NotServed(f"its embedding is a {type(embedding).__name__}, not a table of bfloat16")
        config, inner = head.config, layer.layer
        is_3 = config.version == 3
        self._head = head
        self._grower = TreeGrower(
            layer.stack,
            embedding.weight.detach().contiguous(),
            joined_weight(lm_head),
            None if ids_R is None else ids_R.contiguous(),
            norms=(inner.input_layernorm.weight, inner.hidden_norm.weight, head.norm.weight) if is_3 else None,
            norm_before_residual=config.norm_before_residual,
            fc=None if is_3 else joined_weight(head.fc),
        )

    def grow(
        self, roots: Seq[GrowingRoot], states_BD: Tensor, cache: KVCache, max_nodes: int, depth: int, k: int
    ) -> GrownTrees | None:
        """See `TreeGrower.grow`; None where nodes are to have more children than there are outputs."""
        if k > self._grower.num_outputs:
            return None
        cos_PE, sin_PE = self._head.rotation_table(max(one.position for one in roots) + depth, states_BD)
        keys, values = cache.addresses()
        return self._grower.grow(roots, states_BD, cos_PE, sin_PE, keys[0], values[0], max_nodes, depth, k)
