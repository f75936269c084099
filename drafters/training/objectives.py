"""What heads are trained for: the losses of Medusa, EAGLE-1 and EAGLE-3, one class each, over a packed row."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

from specdec.drafters.heads import EagleHead, MedusaHeads
from specdec.drafters.training.attention import UnrollAttention, packed_attention
from specdec.drafters.training.cross_entropy import linear_cross_entropy
from specdec.drafters.training.rows import Row
from specdec.drafters.training.target import TrainingTarget, as_trained


class Objective(nn.Module):
    """A head and its loss. `layers`: the target's hidden states it reads; `first_offset`: how far ahead its first draft lies.

    Called with a row and its states it gives `loss`, the weighted sum over tokens; `loss_K`, `correct_K` and `count_K` are
    the same per drafted place, unweighted: sums of the cross-entropy, of the tokens got right, of the tokens learnt. All
    chance comes from `seed`. The target is no part of the module: it is neither trained nor saved.
    """

    layers: tuple[int, ...]
    first_offset: int

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def num_targets(self, row: Row) -> int:
        """Tokens of the row that the first drafted place learns; losses are means over these."""
        return int(self.is_learnt(row, self.first_offset).sum())

    def is_learnt(self, row: Row, offset: int) -> Tensor:
        return row.is_learnt(offset)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        return [{"params": [one for one in self.parameters() if one.requires_grad], "lr": learning_rate}]

    def matrices(self) -> list[Tensor]:
        """The weights of the linear layers within the head. LM heads are not among them: their rows are tokens, and an update
        of equal size in all directions would move rare ones as much as frequent ones."""
        config: Any = self.head.config
        widths = {config.vocab_size, getattr(config, "draft_vocab_size", config.vocab_size)}
        layers = [one for one in self.head.modules() if isinstance(one, nn.Linear) and one.out_features not in widths]
        return [layer.weight for layer in layers if layer.weight.requires_grad]

    def at_step(self, step: int) -> None:
        """Called before each training step."""


class MedusaObjective(Objective):
    """Medusa-1: the target is frozen, and head k = 1, 2, ... learns the token k + 1 places on, with weight `decay` ** k
    (Cai et al. 2024, section 2.2.1 and equation 1)."""

    first_offset = 2

    def __init__(self, heads: MedusaHeads, target: TrainingTarget, decay: float = 0.8) -> None:
        super().__init__(heads)
        self._target, self.decay = target, decay
        self.layers = (target.num_layers,)

    def forward(self, row: Row, states: Mapping[int, Tensor], seed: int) -> dict[str, Tensor]:
        last = (self._target.lm_head_VD, self._target.lm_head_bias_V)
        return medusa_losses(self.head, as_trained(states[self.layers[0]]), row, self.decay, last)


def medusa_losses(
    heads: nn.Module, hidden_TD: Tensor, row: Row, decay: float, lm_head: tuple[Tensor, Tensor | None]
) -> dict[str, Tensor]:
    """The losses of Medusa heads that read `hidden_TD`; see `MedusaObjective`. `lm_head` is the target's weight and bias."""
    assert isinstance(heads, MedusaHeads)
    config = heads.config
    learnt_KT = torch.stack([row.is_learnt(k + 2) for k in range(config.num_heads)])
    # Only these tokens' heads are run; the prompt's need not be.
    tokens_M = learnt_KT.any(0).nonzero()[:, 0]
    losses, sums, correct, counts = [], [], [], []
    for k, (head, out_MD) in enumerate(zip(heads, heads(hidden_TD[tokens_M]), strict=True)):
        assert isinstance(head, nn.Sequential)
        weight, bias = (head[-1].get_parameter("weight"), None) if config.has_own_lm_head else lm_head
        learnt_M = learnt_KT[k, tokens_M]
        one = linear_cross_entropy(out_MD, weight, row.ahead(k + 2)[tokens_M], learnt_M.float(), bias)
        losses.append(decay ** (k + 1) * one.loss)
        sums.append(one.loss.detach())
        correct.append((one.correct_M & learnt_M).sum())
        counts.append(learnt_M.sum())
    return _result(losses, sums, correct, counts)


class Eagle1Objective(Objective):
    """EAGLE-1: smooth L1 between drafted and true next feature, plus `token_weight` (w_cls) times the cross-entropy between
    the target's law behind either (Li et al. 2024, section 3.2). Uniform noise of up to `noise` is added to the features
    read, so that the head bears its own errors (same section).

    It drafts one place; further ones are never trained, only hoped for.
    """

    first_offset = 2

    def __init__(self, head: EagleHead, target: TrainingTarget, token_weight: float = 0.1, noise: float = 0.1) -> None:
        super().__init__(head)
        self._target, self.token_weight, self.noise = target, token_weight, noise
        self.layers = head.config.feature_layers

    def forward(self, row: Row, states: Mapping[int, Tensor], seed: int) -> dict[str, Tensor]:
        head, target = self.head, self._target
        assert isinstance(head, EagleHead)
        true_TD = as_trained(states[self.layers[0]])
        read_TD = true_TD
        if self.training and self.noise:
            generator = torch.Generator(true_TD.device).manual_seed(seed)
            uniform = torch.rand(true_TD.shape, generator=generator, device=true_TD.device, dtype=true_TD.dtype)
            read_TD = true_TD + (2 * uniform - 1) * self.noise

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return packed_attention(query.to(value.dtype), key.to(value.dtype), value, row.lengths)

        embeddings = as_trained(_embed(head, target, row.ahead(1)))
        out_TD = head(embeddings, head.fuse([read_TD]), row.positions_T, attend)
        tokens_M = row.is_learnt(2).nonzero()[:, 0]
        drafted_MD, next_MD = out_TD[tokens_M], true_TD[tokens_M + 1]
        regression = smooth_l1_loss(drafted_MD, next_MD, reduction="none").mean(-1).sum()
        one = linear_cross_entropy(
            drafted_MD,
            target.lm_head_VD if head.lm_head is None else head.lm_head.weight,
            lambda part: target.lm_head(states[self.layers[0]][tokens_M[part] + 1]),
            torch.ones(len(tokens_M), device=row.device),
            target.lm_head_bias_V if head.lm_head is None else None,
        )
        loss = regression + self.token_weight * one.loss
        count = torch.tensor(len(tokens_M), device=row.device)
        return {
            **_result([loss], [one.loss.detach()], [one.correct_M.sum()], [count]),
            "regression": regression.detach(),
        }


class Eagle3Objective(Objective):
    """EAGLE-3: training-time test. The head drafts `num_steps` places from every token on its own outputs, and each place's
    law is compared with the target's by soft cross-entropy, place k = 0, 1, ... with weight `decay` ** k (Li et al. 2025,
    section 3.2; the decay is that of the authors' code).

    With a reduced vocabulary, the target's law is renormalised over it, and a token outside it is not learnt: on texts
    that the target drew itself this weighs each place by the law's mass inside, without logits of the whole vocabulary.
    """

    first_offset = 2

    def __init__(self, head: EagleHead, target: TrainingTarget, num_steps: int = 7, decay: float = 0.8) -> None:
        super().__init__(head)
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps} must be >= 1")
        self._target, self.num_steps, self.decay = target, num_steps, decay
        self.layers = tuple(dict.fromkeys((*head.config.feature_layers, target.num_layers)))
        ids = head.draft_to_target_R
        self._lm_head_RD = target.lm_head_VD if ids is None else target.lm_head_VD[ids]
        bias = target.lm_head_bias_V
        self._lm_head_bias_R = bias if bias is None or ids is None else bias[ids]
        self._is_drafted_V: Tensor | None = None
        if ids is not None:
            self._is_drafted_V = torch.zeros(target.vocab_size, dtype=torch.bool, device=ids.device)
            self._is_drafted_V[ids] = True

    def is_learnt(self, row: Row, offset: int) -> Tensor:
        learnt_T = row.is_learnt(offset)
        return learnt_T if self._is_drafted_V is None else learnt_T & self._is_drafted_V[row.ahead(offset)]

    def forward(self, row: Row, states: Mapping[int, Tensor], seed: int) -> dict[str, Tensor]:
        head = self.head
        assert isinstance(head, EagleHead) and head.lm_head is not None
        laws_PR, place_T = self._laws(row, states[self._target.num_layers])
        losses, sums, correct, counts = [], [], [], []
        for k, (out_MD, tokens_M) in enumerate(self.unroll(row, states)):
            learnt_M = self.is_learnt(row, k + 2)[tokens_M]
            places = place_T[tokens_M[learnt_M] + k + 2]
            ones = torch.ones(len(places), device=row.device)
            laws = partial(_rows_of, laws_PR, places)
            one = linear_cross_entropy(head.norm(out_MD[learnt_M]), head.lm_head.weight, laws, ones)
            losses.append(self.decay**k * one.loss)
            sums.append(one.loss.detach())
            correct.append(one.correct_M.sum())
            counts.append(learnt_M.sum())
        # Texts may be too short for the later steps; sums of rows must have one shape.
        nothing = [torch.zeros_like(counts[0])] * (self.num_steps - len(counts))
        zeros = [torch.zeros_like(sums[0])] * len(nothing)
        return _result(losses, sums + zeros, correct + nothing, counts + nothing)

    def unroll(self, row: Row, states: Mapping[int, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Per step the head's outputs [M, D] and the tokens [M] of the row that they lie behind: all of them at first, then
        those that later steps learn from."""
        head = self.head
        assert isinstance(head, EagleHead)
        attention = UnrollAttention(row.lengths)
        tokens_M = torch.arange(len(row.token_ids_T), device=row.device)
        hidden_MD = as_trained(head.fuse([as_trained(states[layer]) for layer in head.config.feature_layers]))
        steps = []
        for k in range(self.num_steps):
            if k == 1:
                later_KT = torch.stack([self.is_learnt(row, j + 2) for j in range(1, self.num_steps)])
                tokens_M = later_KT.any(0).nonzero()[:, 0]
                attention.select(tokens_M)
                hidden_MD = hidden_MD[tokens_M]
            if k and not len(tokens_M):
                break
            embeddings = as_trained(_embed(head, self._target, row.ahead(k + 1)[tokens_M]))
            positions_M = row.positions_T[tokens_M] + k
            if head.config.max_positions is not None:
                # Behind the end of a text nothing is learnt, but everything is run.
                positions_M = positions_M.clamp_max(head.config.max_positions - 1)
            hidden_MD = head(embeddings, hidden_MD, positions_M, attention)
            steps.append((hidden_MD, tokens_M))
        return steps

    def _laws(self, row: Row, final_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The target's logits [P, R] over the draft vocabulary where a token is learnt, and per token which row is its law."""
        learnt_T = (self.is_learnt(row, 0) & (row.positions_T >= self.first_offset)).nonzero()[:, 0]
        place_T = torch.zeros_like(row.token_ids_T)
        place_T[learnt_T] = torch.arange(len(learnt_T), device=row.device)
        weight, bias = self._lm_head_RD.to(final_TD.dtype), self._lm_head_bias_R
        with torch.no_grad(), torch.autocast(row.device.type, enabled=False):
            return nn.functional.linear(final_TD[learnt_T - 1], weight, bias), place_T


def _embed(head: EagleHead, target: TrainingTarget, tokens_T: Tensor) -> Tensor:
    return target.embed(tokens_T) if head.embed_tokens is None else head.embed_tokens(tokens_T)


def _rows_of(laws_PR: Tensor, places: Tensor, part: slice) -> Tensor:
    return laws_PR[places[part]]


def _result(losses: list[Tensor], sums: list[Tensor], correct: list[Tensor], counts: list[Tensor]) -> dict[str, Tensor]:
    return {
        "loss": torch.stack(losses).sum(),
        "loss_K": torch.stack(sums),
        "correct_K": torch.stack(correct),
        "count_K": torch.stack(counts),
    }
