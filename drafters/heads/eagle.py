"""EAGLE heads: one decoder layer that drafts token by token on the target's features."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

# Rotated queries [T, H, E] and the new tokens' keys and values [T, G, E] to [T, H, E]: whoever runs the head keeps the
# earlier keys and knows who sees whom. Scores are scaled by E ** -0.5.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class EagleConfig:
    """Shape of an EAGLE head. `version` 1 is the head of EAGLE-1 and EAGLE-2, 3 that of EAGLE-3.

    `feature_layers` are transformers' indices of hidden states: 0 the embeddings, i the output of layer i, the number of
    layers what lies behind the final norm. `rope` is transformers' `rope_parameters`. `has_own_lm_head` None means: version
    3 has one, version 1 drafts with the target's. Raises ValueError where values contradict each other.
    """

    version: int
    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    rms_norm_eps: float
    vocab_size: int
    draft_vocab_size: int
    feature_layers: tuple[int, ...]
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    fc_bias: bool = False
    attention_bias: bool = False
    norm_before_residual: bool = False
    has_own_embedding: bool = False
    has_own_lm_head: bool | None = None
    max_positions: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "feature_layers", tuple(self.feature_layers))
        if self.has_own_lm_head is None:
            object.__setattr__(self, "has_own_lm_head", self.version == 3)
        if self.version not in (1, 3):
            raise ValueError(f"version={self.version} is no EAGLE head: 1 (EAGLE-1 and EAGLE-2) or 3")
        if (self.version == 1 and len(self.feature_layers) != 1) or not self.feature_layers:
            raise ValueError(f"feature_layers={self.feature_layers}: EAGLE-1 reads one layer, EAGLE-3 one or more")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.hidden_size != self.target_hidden_size and (self.version == 1 or not self.has_own_embedding):
            raise ValueError(
                f"hidden_size={self.hidden_size} differs from target_hidden_size={self.target_hidden_size}: "
                f"only EAGLE-3 with an embedding of its own can be narrower or wider than its target"
            )
        if self.rope.get("rope_type") in ("dynamic", "longrope"):
            raise ValueError(
                f"rope_type={self.rope['rope_type']} turns a token by the length of its text: cached keys would not fit"
            )
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"draft_vocab_size={self.draft_vocab_size} must be between 1 and vocab_size={self.vocab_size}"
            )
        if self.is_reduced and not self.has_own_lm_head:
            raise ValueError(
                f"draft_vocab_size={self.draft_vocab_size} is less than vocab_size={self.vocab_size}: "
                f"a head with a vocabulary of its own needs an LM head of its own"
            )

    @property
    def is_reduced(self) -> bool:
        """Whether the head drafts from a part of the target's vocabulary."""
        return self.draft_vocab_size < self.vocab_size

    @staticmethod
    def default_layers(version: int, num_layers: int) -> tuple[int, ...]:
        """What published heads read of a target with `num_layers` layers: the last state, or a low, a middle and a high one."""
        return (num_layers,) if version == 1 else (2, num_layers // 2, num_layers - 3)


class EagleHead(nn.Module):
    """One decoder layer over token embeddings and target features (Li et al. 2024, EAGLE, section 3; Li et al. 2025,
    EAGLE-3, section 3.1).

    At position t it reads the feature of token t and the embedding of token t + 1, and predicts token t + 2. Everything is
    packed: T tokens of many sequences behind one another. Parameters are named as in published checkpoints; the reduced
    vocabulary's target ids are `draft_to_target_R`, absolute and distinct.
    """

    draft_to_target_R: Tensor | None

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        self.config = config
        hidden, is_3 = config.hidden_size, config.version == 3
        inputs = len(config.feature_layers) * config.target_hidden_size if is_3 else 2 * hidden
        self.fc = nn.Linear(inputs, hidden, bias=config.fc_bias)
        layer = _Layer(config)
        if is_3:
            self.midlayer = layer
            self.norm = LlamaRMSNorm(hidden, config.rms_norm_eps)
        else:
            self.layers = nn.ModuleList([layer])
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden) if config.has_own_embedding else None
        self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False) if config.has_own_lm_head else None
        ids = torch.arange(config.draft_vocab_size) if config.is_reduced else None
        self.register_buffer("draft_to_target_R", ids)
        self._rotary = _Rotary(config)

    def fuse(self, features: Seq[Tensor]) -> Tensor:
        """What the layer reads of the target's features [T, target_hidden], given in the order of `feature_layers`: [T, D]."""
        assert len(features) == len(self.config.feature_layers)
        return features[0] if self.config.version == 1 else self.fc(torch.cat([*features], -1))

    def forward(self, embeddings_TD: Tensor, features_TD: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """The states [T, D] that the next step takes as its features."""
        rotation = self._rotary(positions_T, features_TD)
        if self.config.version == 3:
            return self.midlayer(embeddings_TD, features_TD, rotation, attend)
        fused_TD = self.fc(torch.cat([embeddings_TD, features_TD], -1))
        return self.layers[0](None, fused_TD, rotation, attend)

    def rotation_table(self, num_positions: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [positions, E] of at least so many positions, unsigned."""
        return self._rotary.table(num_positions, like)

    def logits(self, hidden_TD: Tensor, lm_head: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Logits [T, R] over the draft vocabulary; `lm_head`, the target's, is used where the head has none of its own."""
        if self.config.version == 3:
            hidden_TD = self.norm(hidden_TD)
        if self.lm_head is not None:
            return self.lm_head(hidden_TD)
        assert lm_head is not None, "a head without an LM head needs the target's"
        return lm_head(hidden_TD)


class _Layer(nn.Module):
    """A Llama layer; version 1 has no norm before its attention, version 3 attends from embedding and feature together."""

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self._norm_before_residual = config.norm_before_residual
        self.self_attn = _Attention(config)
        mlp = LlamaConfig(hidden_size=hidden, intermediate_size=config.intermediate_size, num_attention_heads=1)
        self.mlp = LlamaMLP(mlp)
        if config.version == 3:
            self.input_layernorm = LlamaRMSNorm(hidden, eps)
            self.hidden_norm = LlamaRMSNorm(hidden, eps)
        self.post_attention_layernorm = LlamaRMSNorm(hidden, eps)

    def forward(
        self, embeddings_TD: Tensor | None, hidden_TD: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend
    ) -> Tensor:
        residual_TD, read = hidden_TD, hidden_TD
        if embeddings_TD is not None:
            normed_TD = self.hidden_norm(hidden_TD)
            read = torch.cat([self.input_layernorm(embeddings_TD), normed_TD], -1)
            residual_TD = normed_TD if self._norm_before_residual else hidden_TD
        hidden_TD = residual_TD + self.self_attn(read, rotation, attend)
        return hidden_TD + self.mlp(self.post_attention_layernorm(hidden_TD))


class _Attention(nn.Module):
    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        self._heads, self._kv_heads, self._size = config.num_heads, config.num_kv_heads, config.head_size
        inputs, bias = config.hidden_size * (2 if config.version == 3 else 1), config.attention_bias
        self.q_proj = nn.Linear(inputs, self._heads * self._size, bias=bias)
        self.k_proj = nn.Linear(inputs, self._kv_heads * self._size, bias=bias)
        self.v_proj = nn.Linear(inputs, self._kv_heads * self._size, bias=bias)
        self.o_proj = nn.Linear(self._heads * self._size, config.hidden_size, bias=bias)

    def forward(self, read: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        # Queries and keys turn by the same angles, so they turn together.
        both = torch.cat([self.q_proj(read), self.k_proj(read)], -1).unflatten(-1, (-1, self._size))
        cos_T1E, sin_T1E = rotation
        both = torch.addcmul(both * cos_T1E, both.roll(self._size // 2, -1), sin_T1E)
        query_THE, key_TGE = both.split([self._heads, self._kv_heads], 1)
        value_TGE = self.v_proj(read).unflatten(-1, (-1, self._size))
        return self.o_proj(attend(query_THE, key_TGE, value_TGE).flatten(1))


class _Rotary:
    """Cosines and signed sines [T, 1, E] of rotary embedding, from a table over all positions where their number is known.

    The signs make `x * cos + roll(x) * sin` the rotation of the halves of x against each other. No module, so that a head
    cast to bfloat16 keeps its frequencies in float32.
    """

    def __init__(self, config: EagleConfig) -> None:
        self._settings = LlamaConfig(
            hidden_size=config.num_heads * config.head_size,
            num_attention_heads=config.num_heads,
            head_dim=config.head_size,
            rope_parameters=dict(config.rope),
            max_position_embeddings=config.max_positions or 2048,
        )
        self._max_positions = config.max_positions
        self._table: tuple[Tensor, Tensor] | None = None
        self._unsigned: tuple[Tensor, Tensor] | None = None

    @cached_property
    def _angles(self) -> LlamaRotaryEmbedding:
        with torch.device("cpu"):
            return LlamaRotaryEmbedding(self._settings)

    def __call__(self, positions_T: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        if self._max_positions is None:
            return self._compute(positions_T, like)
        if self._table is None or self._table[0].device != like.device or self._table[0].dtype != like.dtype:
            # Made while serving, it must serve training too.
            with torch.inference_mode(False):
                self._table = self._compute(torch.arange(self._max_positions, device=like.device), like)
        cos, sin = self._table
        return cos[positions_T], sin[positions_T]

    def table(self, num_positions: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The same for positions 0.. up to at least `num_positions` - 1, without the signs: [positions, E]."""
        found = self._unsigned
        if found is None or len(found[0]) < num_positions or found[0].dtype != like.dtype:
            positions = torch.arange(-(-num_positions // 2048) * 2048, device=like.device)
            cos, sin = self._angles(like, positions[None])
            self._unsigned = found = cos[0].contiguous(), sin[0].contiguous()
        return found

    def _compute(self, positions_T: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._angles(like, positions_T[None])
        half = sin.shape[-1] // 2
        signed = torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)
        return cos[0, :, None], signed[:, None]
