"""New heads for a target: shapes read off its config, LM heads begun as the target's own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from specdec.drafters.heads import EagleConfig, EagleHead, MedusaConfig, MedusaHeads
from specdec.drafters.training.target import TrainingTarget


def new_medusa(target: TrainingTarget, num_heads: int, num_layers: int = 1, own_lm_head: bool = True) -> MedusaHeads:
    """Medusa heads that draft what the target itself predicts. Raises ValueError for numbers below 1."""
    config = MedusaConfig(target.hidden_size, target.vocab_size, num_heads, num_layers, own_lm_head)
    if own_lm_head and target.lm_head_bias_V is not None:
        raise ValueError(
            f"{target.model.name} has a bias in its LM head, and own LM heads have none: own_lm_head=false"
        )
    return MedusaHeads.initial(config, target.lm_head_VD.float() if own_lm_head else None).to(target.device)


def new_eagle(
    target: TrainingTarget,
    version: int,
    seed: int,
    draft_ids_R: Tensor | None = None,
    feature_layers: Seq[int] | None = None,
    intermediate_size: int | None = None,
) -> EagleHead:
    """An EAGLE head with the target's own head sizes and rotary embedding, its weights drawn by `seed`.

    `draft_ids_R` is the reduced vocabulary (None: the target's). An LM head of its own starts as the target's rows. Raises
    ValueError where target and head do not fit.
    """
    text: Any = target.model.model.config.get_text_config(decoder=True)
    num_heads = text.num_attention_heads
    rope = getattr(text, "rope_parameters", None) or {}
    if not rope or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(
            f"{target.model.name} has no single rotary embedding ({rope}): an EAGLE head cannot take it over, use medusa"
        )
    config = EagleConfig(
        version=version,
        hidden_size=target.hidden_size,
        target_hidden_size=target.hidden_size,
        intermediate_size=intermediate_size or text.intermediate_size,
        num_heads=num_heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or num_heads,
        head_size=getattr(text, "head_dim", None) or target.hidden_size // num_heads,
        rms_norm_eps=getattr(text, "rms_norm_eps", 1e-6),
        rope=dict(rope),
        vocab_size=target.vocab_size,
        draft_vocab_size=target.vocab_size if draft_ids_R is None else len(draft_ids_R),
        feature_layers=tuple(feature_layers or EagleConfig.default_layers(version, target.num_layers)),
        fc_bias=version == 1,
        max_positions=target.model.max_positions,
    )
    outside = [layer for layer in config.feature_layers if not 0 <= layer <= target.num_layers]
    if outside:
        raise ValueError(
            f"feature_layers={list(config.feature_layers)}: {target.model.name} has {target.num_layers} layers; give three "
            f"of 0..{target.num_layers} as head.feature_layers="
        )
    with _seeded(seed):
        head = EagleHead(config)
    with torch.no_grad():
        if head.draft_to_target_R is not None and draft_ids_R is not None:
            head.draft_to_target_R.copy_(draft_ids_R)
        if head.lm_head is not None:
            weight_VD = target.lm_head_VD
            head.lm_head.weight.copy_(weight_VD if draft_ids_R is None else weight_VD[draft_ids_R.to(weight_VD.device)])
    return head.to(target.device)


def with_vocabulary(given: EagleHead, new: EagleHead) -> EagleHead:
    """`given` with the draft vocabulary of `new`: rows of its LM head where it knows a token, those of `new` elsewhere. Where
    that is all they differ in, it is of the shape of `new`; else it stays as it is."""
    if replace(given.config, draft_vocab_size=new.config.draft_vocab_size) != new.config:
        return given
    head = copy.deepcopy(new)
    state = {
        name: one for name, one in given.state_dict().items() if name not in ("lm_head.weight", "draft_to_target_R")
    }
    head.load_state_dict(state, strict=False)
    if head.lm_head is not None and given.lm_head is not None:
        place_V = torch.full((head.config.vocab_size,), -1)
        place_V[_ids(given)] = torch.arange(given.config.draft_vocab_size)
        place_R = place_V[_ids(head)].to(head.lm_head.weight.device)
        with torch.no_grad():
            head.lm_head.weight[place_R >= 0] = given.lm_head.weight[place_R[place_R >= 0]].to(head.lm_head.weight)
    return head


def widened(given: EagleHead, new: EagleHead) -> EagleHead:
    """`given` with the larger intermediate size of `new`: it computes what it computed, for what the added units say, which are
    those of `new`, counts nothing yet. Where the two differ in more, or `new` is not the wider one, `given` stays as it is."""
    old, size = given.config.intermediate_size, new.config.intermediate_size
    if old >= size or replace(given.config, intermediate_size=size) != new.config:
        return given
    state = given.state_dict()
    for name, weight in new.state_dict().items():
        if weight.shape != state[name].shape:
            reads_units = name.endswith("down_proj.weight")
            wide = torch.zeros_like(weight) if reads_units else weight.clone()
            wide.narrow(1 if reads_units else 0, 0, old).copy_(state[name])
            state[name] = wide
    head = copy.deepcopy(new)
    head.load_state_dict(state)
    return head


def _ids(head: EagleHead) -> Tensor:
    """The target's ids [R] of the tokens that it drafts from."""
    ids_R = head.draft_to_target_R
    return torch.arange(head.config.vocab_size) if ids_R is None else ids_R.cpu()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
