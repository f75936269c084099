"""Medusa heads as drafter: every place behind the root from the one last state of the target, trees by any policy."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.drafters.heads.frequencies import FrequentTokens, frequent_tokens
from specdec.drafters.heads.medusa import MedusaHeads
from specdec.drafters.heads.source import HeadSource, resolve
from specdec.drafters.network import NetworkDrafter, NetworkRound, NextLogits, fitted
from specdec.drafters.vocabulary import drafting
from specdec.interfaces import Commit
from specdec.model import PagedModel
from specdec.pages import PagePool, page_ends
from specdec.sequence import Sequence


@dataclass
class _State:
    """The state of the last token that went through the target, how many there were, and the states of the last tokens of pages
    that nobody has asked for yet, by the position behind them."""

    last_D: Tensor = field(default_factory=lambda: torch.empty(0))
    covered: int = 0
    notes: dict[int, Tensor] = field(default_factory=dict)


class MedusaDrafter(NetworkDrafter):
    """Drafts with heads on the target's last hidden state (Cai et al. 2024, Medusa, section 2.1).

    The state of the token before the root gave the root itself; from the same state head i predicts the token i + 1 places
    behind it. So a law depends on the depth alone (and on drafted tokens through penalties), and trees end at the
    number of heads. `tokens` are those they draft from (None: all). `int8` rounds weights to 8 bits where our CPU kernels
    run, which halves what a draft reads. Raises ValueError where heads and target do not fit.
    """

    name = "medusa"
    covers_unasked = True

    def __init__(
        self, heads: MedusaHeads | HeadSource[MedusaHeads], tokens: FrequentTokens | None = None, int8: bool = False
    ) -> None:
        self._source, self._tokens, self._int8 = heads, tokens, int8
        self.feature_layers: tuple[int, ...] = ()
        self._states: dict[int, _State] = {}

    def bind(self, target: PagedModel, pool: PagePool) -> None:
        self.heads = resolve(self._source, target)
        config = self.heads.config
        for what, ours, theirs in (
            ("hidden states of size", config.hidden_size, target.hidden_size),
            ("a vocabulary of", config.vocab_size, target.vocab_size),
        ):
            if ours != theirs:
                raise ValueError(
                    f"Medusa heads for {what} {ours} do not fit target {target.name}, which has {theirs}: "
                    f"choose heads trained for this target"
                )
        found = drafting(self.heads, target, self._tokens, self._int8)
        self._served = fitted(found.head, target, _run_once, self._int8)
        self._lm_head, self.ids_R = found.lm_head, found.ids_R
        self.vocab_size, self.device = target.vocab_size, target.device
        self._page_size = pool.page_size
        self.feature_layers = (target.num_layers,)
        self._states.clear()

    def observe(self, commits: Seq[Commit]) -> None:
        (layer,) = self.feature_layers
        for commit in commits:
            hidden_TD, state = commit.hidden[layer], self._states.setdefault(commit.sequence_id, _State())
            # Copies, so that one state does not keep a whole chunk of them.
            state.last_D, state.covered = hidden_TD[-1].clone(), commit.start + len(commit.token_ids)
            for end in page_ends(commit.start, state.covered, self._page_size):
                state.notes[end] = hidden_TD[end - 1 - commit.start].clone()

    def covered(self, sequence_id: int) -> int:
        state = self._states.get(sequence_id)
        return 0 if state is None else state.covered

    def note(self, sequence_id: int, end: int) -> Tensor:
        """The state of the page's last token."""
        return self._states[sequence_id].notes.pop(end)

    def adopt(self, sequence: Sequence, num_positions: int, notes: Seq[Tensor]) -> None:
        self._states[sequence.id] = _State(notes[-1], num_positions)

    def num_unread(self, sequence: Sequence) -> int:
        return 1

    def forget(self, sequence_ids: Seq[int]) -> None:
        for sequence_id in sequence_ids:
            self._states.pop(sequence_id, None)

    def _limit(self, sequence: Sequence) -> int:
        # Before the first token of all there is no state to draft from.
        return self.heads.config.num_heads if sequence.id in self._states else 0

    @torch.inference_mode()
    def _round(self, sequences: Seq[Sequence], limits: list[int]) -> _MedusaRound:
        nothing = next(iter(self._states.values()))
        hidden_BD = torch.stack([self._states.get(one.id, nothing).last_D for one in sequences])
        return _MedusaRound(self, sequences, limits, self._served.logits(hidden_BD, self._lm_head, max(limits)))


class _MedusaRound(NetworkRound):
    """One round: logits [H, B, R] of all heads that the tree may reach, computed at once."""

    def __init__(self, drafter: MedusaDrafter, sequences: Seq[Sequence], limits: list[int], logits_HBR: Tensor) -> None:
        super().__init__(drafter, sequences, limits)
        self._logits_HBR, self.ids_R = logits_HBR, drafter.ids_R

    def expand_root(self) -> _MedusaNext:
        return _MedusaNext(self, self._logits_HBR[0], 1)

    def expand(self, tokens_BW: Tensor, parents_BW: Tensor, depth: int) -> _MedusaNext:
        return _MedusaNext(self, self._logits_HBR[depth], tokens_BW.shape[1])


class _MedusaNext:
    """What one head says, for all W nodes of a level alike."""

    def __init__(self, draft: _MedusaRound, logits_BR: Tensor, width: int) -> None:
        self._draft, self._logits_B1R, self._width = draft, logits_BR[:, None], width

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        tokens, logprobs = self._next(self._logits_B1R).top(k)
        return tokens.expand(-1, self._width, -1), logprobs.expand(-1, self._width, -1)

    def laws(self, paths_BWK: Tensor) -> Tensor:
        if self._draft.has_penalties:
            return self._next(self._logits_B1R.expand(-1, self._width, -1)).laws(paths_BWK)
        return self._next(self._logits_B1R).laws(paths_BWK[:, :1]).expand(-1, self._width, -1)

    def _next(self, logits_BWR: Tensor) -> NextLogits:
        return NextLogits(self._draft, logits_BWR, self._draft.ids_R)


def load(
    path: str, draft_vocab_size: int | None = None, token_frequencies: str | None = None, int8: bool = True
) -> MedusaDrafter:
    """A drafter from a checkpoint of any known format, over the `draft_vocab_size` most frequent tokens (None: all); raises
    what `load_head` and `frequent_tokens` do. `int8`: see `MedusaDrafter`."""
    source = HeadSource(path, MedusaHeads)
    return MedusaDrafter(source, frequent_tokens(source.folder, draft_vocab_size, token_frequencies), int8)


def _run_once(heads: MedusaHeads) -> None:
    parameter = next(heads.parameters())
    heads.logits(parameter.new_zeros(1, heads.config.hidden_size), lambda hidden_TD: hidden_TD)
