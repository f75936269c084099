"""Stand-ins: a small real model padded to the shapes of a large one, which says the same and costs what the large one does."""

from __future__ import annotations

from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from specdec.loading import DTYPES, ModelSizes, load_model, place_of, prepare
from specdec.model import PagedModel

_FAMILIES = ("llama", "mistral", "qwen2")
_ROPES = ("default", "linear", "llama3")
# What an added token's logit is multiplied with: far below any real logit, finite in bfloat16 and float32.
_NEVER = -1e9


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-like model; the defaults are Llama-3.1-8B's."""

    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128
    vocab_size: int = 128256

    @staticmethod
    def of(model: PreTrainedModel) -> ModelShape:
        config = model.config
        return ModelShape(
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            config.vocab_size,
        )

    def require_room(self, small: ModelShape) -> None:
        """Raises ValueError, naming the size, unless a model of shape `small` fits into this one."""
        for one in fields(self):
            if getattr(self, one.name) < getattr(small, one.name):
                raise ValueError(
                    f"{one.name}={getattr(self, one.name)} is less than the small model's {getattr(small, one.name)}: a "
                    f"stand-in can only be larger"
                )
        if self.num_heads % self.num_kv_heads or self.hidden_size % self.num_heads or self.head_size % 2:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads} and divide "
                f"hidden_size={self.hidden_size}, and head_size={self.head_size} must be even"
            )
        if self.num_heads // self.num_kv_heads < small.num_heads // small.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} over num_kv_heads={self.num_kv_heads} gives each of them fewer heads than the "
                f"small model's {small.num_heads // small.num_kv_heads}: raise num_heads"
            )
        if self.vocab_size > small.vocab_size and self.hidden_size == small.hidden_size:
            raise ValueError(
                f"vocab_size={self.vocab_size} adds tokens, which takes a spare dimension: raise hidden_size above "
                f"{small.hidden_size}"
            )


@torch.no_grad()
def widen(
    base: PreTrainedModel,
    shape: ModelShape,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LlamaForCausalLM:
    """A Llama of `shape` whose logits are those of `base`, its added tokens never chosen (Chen et al. 2016, Net2Net, is the
    idea of a wider and deeper network that computes the same).

    The residual stream keeps zeros behind the small model's dimensions, but for one constant, so every hidden state begins
    with the small model's. Layers are added at the end, and only hidden state `num_layers` moves. What nobody reads is noise
    at the scale of real weights: products of zeros would cost less power than real ones, and so less time.
    Raises ValueError for a model that is not like Llama, or does not fit into `shape`.
    """
    _require_llama_like(base)
    small = ModelShape.of(base)
    shape.require_room(small)
    wide = _noise(base, small, shape, dtype, device)
    place = Placement(small, shape, wide.device)
    eps = base.config.rms_norm_eps
    # A norm's mean runs over zeros too: what it divides by is smaller by the root of the ratio. The constant's share of
    # the mean is what eps was, so that of all tokens it is never zero behind a norm.
    constant = (small.hidden_size * eps) ** 0.5
    old: Any = base.model
    new: Any = wide.model
    new.embed_tokens.weight.zero_()
    new.embed_tokens.weight[: small.vocab_size, : small.hidden_size] = _to(
        old.embed_tokens.weight, new.embed_tokens.weight
    )
    for index, layer in enumerate(new.layers):
        if index < small.num_layers:
            _copy_layer(old.layers[index], layer, place)
        else:
            # It computes as much as any other, and adds nothing.
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    place.norm(old.norm, new.norm)
    head = base.get_output_embeddings().weight
    wide.lm_head.weight[: small.vocab_size, : small.hidden_size] = _to(head, wide.lm_head.weight)
    wide.lm_head.weight[small.vocab_size :].zero_()
    if place.spare:
        new.embed_tokens.weight[:, -1] = constant
        new.norm.weight[-1] = 1
        wide.lm_head.weight[: small.vocab_size, -1] = 0
        wide.lm_head.weight[small.vocab_size :, -1] = _NEVER
    # Equal but for rounding already: the base of the frequencies was chosen so.
    half = small.head_size // 2
    for name in ("inv_freq", "original_inv_freq"):
        frequencies = getattr(new.rotary_emb, name)[:half]
        wanted = _to(getattr(old.rotary_emb, name), frequencies)
        assert torch.allclose(frequencies, wanted, rtol=1e-4), "the stand-in would turn its heads by other angles"
        frequencies.copy_(wanted)
    return wide.eval().requires_grad_(False)


def load_stand_in(
    path: str | PathLike[str],
    shape: ModelShape,
    *,
    gguf_file: str | None = None,
    dtype: str = "auto",
    device: str | torch.device = "auto",
    **options: Any,
) -> StandIn:
    """The model at `path` widened to `shape` on `device`; `dtype` auto is bfloat16, `options` and errors as in `load_model`."""
    place = place_of(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; use auto, {', '.join(DTYPES)}")
    base = load_model(
        path, gguf_file=gguf_file, dtype="float32", device="cpu", self_check=False, packed=False, numerics="fast"
    )
    number = DTYPES.get(dtype, torch.bfloat16)
    stand_in = StandIn(base.model, shape, number, place, base.tokenizer, f"{base.name} widened")
    prepare(stand_in, **options)
    return stand_in


class StandIn(PagedModel):
    """`base` widened to `shape`; `small` is the shape of the base and `small_eps` the eps of its norms, for heads that were
    made for it."""

    def __init__(
        self,
        base: PreTrainedModel,
        shape: ModelShape,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        tokenizer: PreTrainedTokenizerBase | None = None,
        name: str = "",
    ) -> None:
        self.small, self.shape, self.small_eps = ModelShape.of(base), shape, float(base.config.rms_norm_eps)
        super().__init__(widen(base, shape, dtype, device), tokenizer, name or "stand-in")

    @property
    def small_sizes(self) -> ModelSizes:
        return ModelSizes(self.small.hidden_size, self.small.vocab_size, self.small.num_layers)


class Placement:
    """Where a small model's heads and dimensions lie in a wide one: rows of its projections, and of the residual stream."""

    def __init__(self, small: ModelShape, wide: ModelShape, device: torch.device) -> None:
        self.small, self.wide = small, wide
        self.spare = wide.hidden_size - small.hidden_size
        per_group, wide_per_group = small.num_heads // small.num_kv_heads, wide.num_heads // wide.num_kv_heads
        heads = torch.arange(small.num_heads, device=device)
        groups = torch.arange(small.num_kv_heads, device=device)
        # Rotary embedding turns dimension i with i + E/2, so both halves stay at the beginning of the wide halves.
        half = torch.arange(small.head_size // 2, device=device)
        sizes = torch.cat([half, wide.head_size // 2 + half])
        self.query_rows = self._rows(heads // per_group * wide_per_group + heads % per_group, sizes)
        self.key_rows = self._rows(groups, sizes)
        self.inner_rows = torch.arange(small.intermediate_size, device=device)
        self.residual = torch.arange(small.hidden_size, device=device)

    def norm(self, old: Any, new: Any) -> None:
        """A wide norm that does what the small one does, and gives zeros behind its dimensions."""
        new.weight.zero_()
        scale = (self.small.hidden_size / self.wide.hidden_size) ** 0.5
        new.weight[: self.small.hidden_size] = _to(old.weight, new.weight, scale=scale)

    def _rows(self, heads: Tensor, sizes: Tensor) -> Tensor:
        return (heads[:, None] * self.wide.head_size + sizes).flatten()


def _copy_layer(old: Any, new: Any, place: Placement) -> None:
    place.norm(old.input_layernorm, new.input_layernorm)
    place.norm(old.post_attention_layernorm, new.post_attention_layernorm)
    copy_attention(old.self_attn, new.self_attn, place, place.residual)
    copy_mlp(old.mlp, new.mlp, place)


def copy_attention(old: Any, new: Any, place: Placement, reads: Tensor) -> None:
    """The small projections at their places in the wide ones, which read the dimensions `reads`."""
    # Scores are divided by the root of the head size, which has grown.
    scale = (place.wide.head_size / place.small.head_size) ** 0.5
    # Beside a real head's dimensions lie zeros, for its scores are sums over all of them.
    new.k_proj.weight[: place.small.num_kv_heads * place.wide.head_size] = 0
    new.o_proj.weight.zero_()
    copy_linear(old.q_proj, new.q_proj, place.query_rows, reads, scale)
    copy_linear(old.k_proj, new.k_proj, place.key_rows, reads)
    copy_linear(old.v_proj, new.v_proj, place.key_rows, reads)
    copy_linear(old.o_proj, new.o_proj, place.residual, place.query_rows)


def copy_mlp(old: Any, new: Any, place: Placement) -> None:
    new.down_proj.weight.zero_()
    copy_linear(old.gate_proj, new.gate_proj, place.inner_rows, place.residual)
    copy_linear(old.up_proj, new.up_proj, place.inner_rows, place.residual)
    copy_linear(old.down_proj, new.down_proj, place.residual, place.inner_rows)


def copy_linear(old: nn.Linear, new: nn.Linear, rows: Tensor, columns: Tensor, scale: float = 1.0) -> None:
    """Puts a small layer's weights at these rows and columns of a wide one."""
    new.weight[rows[:, None], columns] = _to(old.weight, new.weight, scale=scale)
    if old.bias is not None:
        new.bias[rows] = _to(old.bias, new.bias, scale=scale)


def _to(values: Tensor, like: Tensor, scale: float = 1.0) -> Tensor:
    """Values as `like` stores them, scaled in float32 so that they are rounded once."""
    return (values.detach().to(like.device, torch.float32) * scale).to(like.dtype)


def _noise(
    base: PreTrainedModel, small: ModelShape, shape: ModelShape, dtype: torch.dtype, device: torch.device | str
) -> LlamaForCausalLM:
    """The wide model as transformers initialises it; the global random state is left alone."""
    old: Any = base.config
    first: Any = base.model.layers[0]
    spare = shape.hidden_size > small.hidden_size
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_size,
        hidden_act=old.hidden_act,
        max_position_embeddings=old.max_position_embeddings,
        rms_norm_eps=0.0 if spare else old.rms_norm_eps,
        rope_parameters=wide_rope(old.rope_parameters, shape.head_size / small.head_size),
        attention_bias=first.self_attn.q_proj.bias is not None,
        mlp_bias=first.mlp.up_proj.bias is not None,
        tie_word_embeddings=False,
        pad_token_id=getattr(old, "pad_token_id", None),
        bos_token_id=getattr(old, "bos_token_id", None),
        eos_token_id=getattr(old, "eos_token_id", None),
    )
    place = torch.device(device)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []), place:
        torch.manual_seed(0)
        wide = LlamaForCausalLM._from_config(config, dtype=dtype)
    if getattr(base, "generation_config", None) is not None:
        wide.generation_config = base.generation_config
    return wide


def wide_rope(old: dict[str, Any], growth: float) -> dict[str, Any]:
    """The rope parameters of heads `growth` times as long that turn the small ones' dimensions as they did.

    Frequency i is base ** (-2i / E): with the base raised to the power of the growth of E it stays where it was.
    """
    return {**old, "rope_theta": float(old["rope_theta"]) ** growth}


def _require_llama_like(base: PreTrainedModel) -> None:
    config: Any = base.config
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type not in _FAMILIES:
        found = f"a {config.model_type} model; widened are {', '.join(_FAMILIES)}"
    elif windowed:
        found = f"a model with a sliding window of {config.sliding_window}, which Llama has not"
    elif rope.get("rope_type") not in _ROPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        found = f"a model with rope_parameters={rope}; widened are rope types {', '.join(_ROPES)}"
    else:
        return
    raise ValueError(f"{type(base).__name__} cannot stand in for a larger one: it is {found}")
