"""EAGLE-3 heads for stand-ins: padded as the target is, so that they draft what they drafted, at a large head's cost."""

from __future__ import annotations

from dataclasses import replace

import torch

from specdec.drafters.heads.eagle import EagleHead
from specdec.stand_in import ModelShape, Placement, copy_attention, copy_linear, copy_mlp, wide_rope


@torch.no_grad()
def widen_eagle(head: EagleHead, base: ModelShape, shape: ModelShape, target_eps: float) -> EagleHead:
    """The head of a target of shape `base` for the same target widened to `shape`; see `specdec.stand_in.widen`.

    `target_eps` is the small target's rms_norm_eps. It drafts the same tokens, of the small vocabulary. Raises ValueError for
    a head with an embedding of its own or of another version, and where `shape` has no room.
    """
    old = head.config
    if old.version != 3 or old.has_own_embedding or old.hidden_size != base.hidden_size:
        raise ValueError(f"widened are EAGLE-3 heads on their target's embedding, not version={old.version} of another")
    small = ModelShape(
        old.hidden_size,
        old.intermediate_size,
        base.num_layers,
        old.num_heads,
        old.num_kv_heads,
        old.head_size,
        old.vocab_size,
    )
    shape.require_room(small)
    ratio = small.hidden_size / shape.hidden_size
    config = replace(
        old,
        hidden_size=shape.hidden_size,
        target_hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_size=shape.head_size,
        rms_norm_eps=old.rms_norm_eps * ratio,
        vocab_size=shape.vocab_size,
        # Behind the final norm is where it was; all other states keep their numbers.
        feature_layers=tuple(shape.num_layers if i == base.num_layers else i for i in old.feature_layers),
        rope=wide_rope(old.rope, shape.head_size / small.head_size),
    )
    like = head.fc.weight
    with torch.random.fork_rng(devices=[like.device] if like.is_cuda else []), like.device:
        torch.manual_seed(0)
        wide = EagleHead(config).to(like.dtype)
    place = Placement(small, shape, like.device)
    reads = torch.cat([place.residual, shape.hidden_size + place.residual])
    blocks = torch.arange(len(config.feature_layers), device=like.device) * shape.hidden_size
    # The target's states hold a constant behind the small ones, which must not be read.
    wide.fc.weight.zero_()
    if wide.fc.bias is not None:
        wide.fc.bias.zero_()
    copy_linear(head.fc, wide.fc, place.residual, (blocks[:, None] + place.residual).flatten())
    for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        place.norm(getattr(head.midlayer, name), getattr(wide.midlayer, name))
    # The constant is the target's eps already, in the embeddings that this norm reads.
    wide.midlayer.input_layernorm.variance_epsilon = (old.rms_norm_eps - target_eps) * ratio
    copy_attention(head.midlayer.self_attn, wide.midlayer.self_attn, place, reads)
    copy_mlp(head.midlayer.mlp, wide.midlayer.mlp, place)
    place.norm(head.norm, wide.norm)
    assert head.lm_head is not None and wide.lm_head is not None
    copy_linear(head.lm_head, wide.lm_head, torch.arange(old.draft_vocab_size, device=like.device), place.residual)
    if wide.draft_to_target_R is not None:
        ids = head.draft_to_target_R
        wide.draft_to_target_R.copy_(torch.arange(old.draft_vocab_size) if ids is None else ids)
    return wide.eval().requires_grad_(False)
