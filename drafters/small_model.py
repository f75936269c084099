"""A small causal LM as drafter: its own keys and values on the target's pages, trees by any policy."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.drafters.growth import Grown
from specdec.drafters.levels import LevelDrafter, LevelRound, Span
from specdec.drafters.network import NextLogits
from specdec.interfaces import Commit
from specdec.kv_cache import KVCache
from specdec.model import PagedModel, Segment
from specdec.pages import PagePool, PageTable
from specdec.sequence import Sequence


@dataclass
class _State:
    """How far the draft model has computed a sequence, and where it ran the nodes of the last tree."""

    table: PageTable
    num_computed: int = 0
    expanded: Tensor | None = None


class SmallModelDrafter(LevelDrafter):
    """Drafts with a smaller model of the target's vocabulary (Leviathan et al. 2023, section 2; trees as in Miao et al. 2023).

    Its keys and values lie in the same slots as the target's, in tensors of its own: the page tables are shared. Raises
    ValueError where the vocabularies differ, naming both sizes.
    """

    name = "small_model"
    # Texts are not run where nobody drafts.
    covers_unasked = False
    feature_layers: tuple[int, ...] = ()

    def __init__(self, model: PagedModel) -> None:
        self.model = model
        self.vocab_size, self.device = model.vocab_size, model.device
        self._cache: KVCache | None = None
        self._states: dict[int, _State] = {}

    def bind(self, target: PagedModel, pool: PagePool) -> None:
        check_vocabulary(target, self.model)
        self.vocab_size = target.vocab_size
        if self._cache is not None:
            self._cache.release()
        self._cache = self.model.new_cache(pool)
        self._states.clear()

    @property
    def cache(self) -> KVCache:
        assert self._cache is not None, "bind() comes first"
        return self._cache

    def observe(self, commits: Seq[Commit]) -> None:
        """Moves the accepted nodes it has run to their positions, and reads along."""
        source, target = [], []
        for commit in commits:
            state = self._states.get(commit.sequence_id)
            if state is None or commit.nodes is None or state.expanded is None:
                continue
            expanded: list[int] = state.expanded.tolist()
            for depth, node in enumerate(commit.nodes[1:], 1):
                if expanded[node] < 0:
                    break
                source.append(state.table.slot(commit.start + expanded[node]))
                target.append(state.table.slot(commit.start + depth))
                state.num_computed = commit.start + depth + 1
            state.expanded = None
        self.cache.move(source, target)
        self._read_along(commits)

    def covered(self, sequence_id: int) -> int:
        return self._num_read(sequence_id)

    def num_unread(self, sequence: Sequence) -> int:
        return max(len(sequence.token_ids) - self._num_read(sequence.id), 1)

    def _num_read(self, sequence_id: int) -> int:
        state = self._states.get(sequence_id)
        return 0 if state is None else state.num_computed

    def note(self, sequence_id: int, end: int) -> None:
        """All that it has of a page's tokens is on the page."""

    def adopt(self, sequence: Sequence, num_positions: int, notes: Seq[None]) -> None:
        self._states[sequence.id] = _State(sequence.table, num_positions)

    def forget(self, sequence_ids: Seq[int]) -> None:
        for sequence_id in sequence_ids:
            self._states.pop(sequence_id, None)

    def state(self, sequence: Sequence) -> _State:
        return self._states.setdefault(sequence.id, _State(sequence.table))

    def _limit(self, sequence: Sequence) -> int:
        if self.model.max_positions is None:
            return sequence.max_draft_depth
        # The deepest level is never run through the draft model, so it may lie one position further.
        return self.model.max_positions - sequence.root_position

    def _round(self, sequences: Seq[Sequence], limits: list[int]) -> _ModelRound:
        return _ModelRound(self, sequences, limits, [self.state(one) for one in sequences])

    def _note(self, sequences: Seq[Sequence], grown: Grown) -> None:
        # On its way while the trees are verified: the host has waited for their verdict when it looks at this.
        for one, expanded in zip(sequences, grown.expanded_BN.to("cpu", non_blocking=True), strict=True):
            self._states[one.id].expanded = expanded


class _ModelRound(LevelRound):
    """One round: catches the draft model up to the root, then runs the tree's nodes level by level."""

    def __init__(
        self, drafter: SmallModelDrafter, sequences: Seq[Sequence], limits: list[int], states: Seq[_State]
    ) -> None:
        super().__init__(drafter, sequences, limits, states)
        self._model, self._cache = drafter.model, drafter.cache

    def expand_root(self) -> NextLogits:
        return self._next(self.catch_up()[:, None])

    def expand(self, tokens_BW: Tensor, parents_BW: Tensor, depth: int) -> NextLogits:
        segments, live = self.level(tokens_BW, parents_BW, depth)
        logits_RV = self._forward(segments)
        return self._next(self.spread(logits_RV.view(len(live), tokens_BW.shape[1], -1), live))

    def run_chunk(self, segments: list[Segment], spans: list[Span], rows_R: Tensor) -> Tensor:
        return self._forward(segments, rows_R)

    def _forward(self, segments: list[Segment], rows_R: Tensor | None = None) -> Tensor:
        last = self._model.vocab_size - 1
        if self.vocab_size > last + 1:
            # A target padded wider can emit an id that the draft model has no row for; any draft is as good behind it.
            segments = [replace(one, token_ids_Q=one.token_ids_Q.clamp_max(last)) for one in segments]
        return self._model.forward(segments, self._cache, rows_R).logits_RV

    def _next(self, logits_BWV: Tensor) -> NextLogits:
        return NextLogits(self, fit_vocabulary(logits_BWV, self.vocab_size))


def check_vocabulary(target: PagedModel, draft: PagedModel) -> None:
    """Raises ValueError unless both models read the same tokens; padding of the logits alone may differ."""
    if target.tokenizer is not None and draft.tokenizer is not None:
        ours, theirs = target.tokenizer.get_vocab(), draft.tokenizer.get_vocab()
        if ours == theirs:
            return
        sizes = f"{len(theirs)} and {len(ours)} tokens"
    elif target.vocab_size == draft.vocab_size:
        return
    else:
        sizes = f"{draft.vocab_size} and {target.vocab_size} tokens"
    raise ValueError(
        f"draft model {draft.name} and target {target.name} have different vocabularies ({sizes}): "
        f"choose a draft model with the target's tokenizer"
    )


def fit_vocabulary(logits: Tensor, vocab_size: int) -> Tensor:
    """Logits cut or padded (with -inf) to the target's width: families pad their embeddings differently."""
    missing = vocab_size - logits.shape[-1]
    return logits if missing == 0 else pad(logits, (0, missing), value=-torch.inf)


def load(path: str, int8: bool = True, **options: object) -> SmallModelDrafter:
    """A drafter from a hub id, folder or GGUF file; options as in `specdec.loading.load_model`."""
    # How drafts round changes no text.
    return SmallModelDrafter(PagedModel.load(path, int8=int8, **{"numerics": "fast", **options}))
