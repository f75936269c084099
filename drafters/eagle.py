"""An EAGLE head as drafter: one layer on the target's features, its keys and values on the target's pages."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from specdec.decoder import NotServed
from specdec.drafters.features import Features, PageNote, joined
from specdec.drafters.growth import Grown
from specdec.drafters.heads.eagle import EagleHead
from specdec.drafters.heads.frequencies import FrequentTokens, frequent_tokens
from specdec.drafters.heads.fused import FusedEagle, FusedGrowth
from specdec.drafters.heads.source import HeadSource, resolve
from specdec.drafters.levels import LevelDrafter, LevelRound, Span
from specdec.drafters.network import NextLogits, fitted
from specdec.drafters.vocabulary import drafting
from specdec.int_tensor import int_tensor
from specdec.interfaces import Commit
from specdec.kernels.cpu import GrowingRoot, GrownTrees
from specdec.kernels.tree_attention import AttentionPlan, tree_attention
from specdec.kv_cache import KVCache, LayerShape
from specdec.model import PagedModel, Segment, plan_attention
from specdec.packing import can_pack
from specdec.pages import PagePool, PageTable, TableView, page_ends
from specdec.sequence import Sequence
from specdec.static_shapes import StaticInputs
from specdec.tree import TokenTree


@dataclass
class _State:
    """How far the head has computed a sequence, and the features that it has not read yet, with the last that it has, for a
    tree may be asked for again.

    `notes` are of its full pages, by the position behind them, until they are asked for; `filling` those of its own pages that
    have entries to read, `adopted` of the pages that came with a shared prefix and were not read when it began.
    """

    num_computed: int = 0
    features: Features = field(default_factory=Features)
    notes: dict[int, PageNote] = field(default_factory=dict)
    filling: list[PageNote] = field(default_factory=list)
    adopted: list[PageNote] = field(default_factory=list)

    def read_to(self, entry: int) -> None:
        """The entries before this one have been run."""
        for note in self.filling:
            note.read_to(entry)
        self.filling = [note for note in self.filling if not note.is_read]

    def waiting(self) -> list[PageNote]:
        """The adopted pages that nobody has read yet, in their order."""
        self.adopted = [note for note in self.adopted if not note.is_read]
        return self.adopted


class EagleDrafter(LevelDrafter):
    """Drafts with an EAGLE head (Li et al. 2024, EAGLE, section 3; Li et al. 2025, EAGLE-3, section 3.1).

    Its entry t reads the feature of token t and token t + 1, in whose slot it lies. Final tokens are run with the target's own
    features, as the verifying forward gave them; drafted nodes with the head's own outputs in their place. What a tree left
    behind in the slots is overwritten, never committed. Full pages are shared with what is needed to go on: the feature of
    their last position, and while their entries have not been run the features of these, so that a prompt need not be read
    where no draft pays. `tokens` are those it drafts from (None: all that the head knows). `int8` rounds the head's weights to
    8 bits where our CPU kernels run, which halves what a draft reads. Raises ValueError where head and target do not fit.
    """

    name = "eagle"
    covers_unasked = True
    # Pages that may be shared before they have been read: so many, or this part of all. Their features take a tenth or two of
    # the memory that their keys and values take, of which a GPU has none to spare.
    _MOST_WAITING, _WAITING_SHARES = 64, {"cpu": 1.0, "cuda": 1 / 8}

    def __init__(
        self, head: EagleHead | HeadSource[EagleHead], tokens: FrequentTokens | None = None, int8: bool = False
    ) -> None:
        self._source, self._tokens, self._int8 = head, tokens, int8
        self.feature_layers: tuple[int, ...] = ()
        self._cache: KVCache | None = None
        self._states: dict[int, _State] = {}
        self._unread: weakref.WeakSet[PageNote] = weakref.WeakSet()

    def bind(self, target: PagedModel, pool: PagePool) -> None:
        self.head = resolve(self._source, target)
        check_fit(self.head, target)
        self.feature_layers = self.head.config.feature_layers
        found = drafting(self.head, target, self._tokens, self._int8)
        self._served = fitted(found.head, target, _run_once, self._int8)
        self._lm_head, self._ids_R = found.lm_head, found.ids_R
        self._fused: FusedEagle | None = None
        self._growth: FusedGrowth | None = None
        if can_pack(target.device, target.dtype):
            with suppress(NotServed):
                self._fused = FusedEagle(self._served)
                self._growth = self._fused_growth(target, found.lm_head)
        self.vocab_size, self.device = target.vocab_size, target.device
        self._target = target
        if self._cache is not None:
            self._cache.release()
        config = self.head.config
        shape = LayerShape(config.num_kv_heads, config.head_size, config.head_size)
        self._cache = KVCache(pool, [shape], target.dtype, target.device)
        self._pool = pool
        self._states.clear()
        self._unread.clear()

    def _fused_growth(self, target: PagedModel, lm_head: Callable[[Tensor], Tensor]) -> FusedGrowth:
        assert self._fused is not None
        embedding: nn.Module = self._served.embed_tokens or target.model.get_input_embeddings()
        # A part of the target's LM head stands in a sequence of its own.
        whole: nn.Module = target.model.get_output_embeddings()
        outputs = self._served.lm_head or (lm_head[0] if isinstance(lm_head, nn.Sequential) else whole)
        return FusedGrowth(self._served, self._fused, embedding, outputs, self._ids_R)

    @torch.inference_mode()
    def observe(self, commits: Seq[Commit]) -> None:
        """Keeps the target's states and reads along; the last ones are read in `propose`, with the root."""
        limit, page_size = self.head.config.max_positions, self._pool.page_size
        wanted = [commit for commit in commits if limit is None or commit.start < limit]
        each = joined([commit.hidden for commit in wanted], self.feature_layers)
        for commit, states in zip(wanted, each, strict=True):
            state = self._states.get(commit.sequence_id)
            if state is None:
                state = self._states[commit.sequence_id] = _State()
            state.features.add(states)
            for end in page_ends(commit.start, state.features.end, page_size):
                self._fill(state, end)
        self._read_along(wanted)

    def _fill(self, state: _State, end: int) -> None:
        """A page is full: the one that ends before position `end`."""
        # Its first entry is that of the feature before it.
        first, last = max(end - self._pool.page_size - 1, 0), end - 1
        start = min(max(state.num_computed, first), last)
        note = state.notes[end] = PageNote(start, last, state.features.part(start, end), self._unread)
        if not note.is_read:
            state.filling.append(note)

    def covered(self, sequence_id: int) -> int:
        state = self._states.get(sequence_id)
        return 0 if state is None else state.features.end

    def note(self, sequence_id: int, end: int) -> PageNote:
        return self._states[sequence_id].notes.pop(end)

    def adopt(self, sequence: Sequence, num_positions: int, notes: Seq[PageNote]) -> None:
        last = notes[-1].features.part(num_positions - 1, num_positions)
        adopted = [note for note in notes if not note.is_read]
        self._states[sequence.id] = _State(num_positions - 1, last, adopted=adopted)

    def num_unread(self, sequence: Sequence) -> int:
        state = self._states.get(sequence.id)
        if state is None:
            return max(len(sequence.token_ids) - 1, 1)
        num_waiting = sum(note.end - note.start for note in state.waiting())
        return max(len(sequence.token_ids) - 1 - state.num_computed, 1) + num_waiting

    def _num_read(self, sequence_id: int) -> int:
        state = self._states.get(sequence_id)
        return 0 if state is None else state.num_computed

    @property
    def _reads_prompts(self) -> bool:
        """What has not been read is shared with its features, as long as these are not too many."""
        share = self._WAITING_SHARES.get(self.device.type, 0.0)
        return len(self._unread) > max(self._MOST_WAITING, share * self._pool.num_pages)

    def forget(self, sequence_ids: Seq[int]) -> None:
        for sequence_id in sequence_ids:
            self._states.pop(sequence_id, None)

    def fuse(self, each: Seq[Features]) -> None:
        """Turns all that was kept of the target's states into the head's features, at once."""
        Features.fuse(each, lambda states: self._served.fuse(states.chunk(len(self.feature_layers), 1)))

    @torch.inference_mode()
    def run(self, segments: Seq[Segment], features_TD: Tensor, rows_R: Tensor | None = None) -> Tensor:
        """One forward of the head over the packed entries of all segments, whose keys and values are in the cache then: what it
        gives at the packed rows `rows_R` (None: at all)."""
        assert self._cache is not None, "bind() comes first"
        cache, plan = self._cache, plan_attention(segments, self.device)
        if cache.graphs is not None:

            def body(inputs: StaticInputs) -> tuple[Tensor, ...]:
                return (self._run(inputs.tokens_T, inputs.extra[0], inputs.positions_T, inputs.plan),)

            replayed = cache.graphs.run(self.name, segments, plan, cache.scratch_slot, body, (features_TD,))
            if replayed is not None:
                return replayed[0] if rows_R is None else replayed[0][rows_R]
        tokens_T = torch.cat([segment.token_ids_Q for segment in segments])
        positions_T = torch.cat([segment.positions_Q for segment in segments])
        return self._run(tokens_T, features_TD, positions_T, plan, rows_R)

    def _run(
        self,
        tokens_T: Tensor,
        features_TD: Tensor,
        positions_T: Tensor,
        plan: AttentionPlan,
        rows_R: Tensor | None = None,
    ) -> Tensor:
        cache = self._cache
        assert cache is not None

        def attend(query_THE: Tensor, key_TGE: Tensor, value_TGE: Tensor) -> Tensor:
            cache.write(0, plan.slots_T, plan.first_slot, key_TGE, value_TGE)
            return tree_attention(query_THE, *cache.layer(0), plan, scaling=query_THE.shape[-1] ** -0.5)

        embed = self._target.embed if self._served.embed_tokens is None else self._served.embed_tokens
        if self._fused is not None:
            return self._fused.run(embed(tokens_T), features_TD, positions_T, plan, cache, rows_R)
        states_TD = self._served(embed(tokens_T), features_TD, positions_T, attend)
        return states_TD if rows_R is None else states_TD[rows_R]

    @torch.inference_mode()
    def answer(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [T, R] over the draft vocabulary, and its target ids where it is a part of the target's."""
        return self._served.logits(hidden_TD, self._lm_head), self._ids_R

    @torch.inference_mode()
    def confidence_trees(
        self, roots: Seq[GrowingRoot], states_BD: Tensor, max_nodes: int, depth: int, k: int
    ) -> GrownTrees | None:
        """Trees behind the roots, whose states are given, in one call; None where there is none."""
        if self._growth is None or self._cache is None:
            return None
        return self._growth.grow(roots, states_BD, self._cache, max_nodes, depth, k)

    @property
    def grows_at_once(self) -> bool:
        """Whether `confidence_trees` may serve."""
        return self._growth is not None

    def _limit(self, sequence: Sequence) -> int:
        if sequence.id not in self._states:
            # Before the first token of all there is no feature.
            return 0
        limit = self.head.config.max_positions
        # The root's entry has the position before the root's, and the deepest level is never run.
        return sequence.max_draft_depth if limit is None else limit + 1 - sequence.root_position

    def _round(self, sequences: Seq[Sequence], limits: list[int]) -> _EagleRound:
        return _EagleRound(self, sequences, limits, [self._states.get(one.id, _State()) for one in sequences])


class _EagleRound(LevelRound):
    """One round: catches the head up to the root, then runs the tree's nodes level by level on its own outputs."""

    shift = 1
    # Pages of a shared prefix that a row has read at once.
    _MOST_PAGES = 32

    def __init__(self, drafter: EagleDrafter, sequences: Seq[Sequence], limits: list[int], states: Seq[_State]) -> None:
        super().__init__(drafter, sequences, limits, states)
        self._eagle, self._states = drafter, states

    def catch_up(self) -> Tensor:
        self._read_adopted([row for row, limit in enumerate(self.limits) if limit > 0])
        return super().catch_up()

    def read(self, ends: list[int]) -> None:
        self._read_adopted(range(len(ends)))
        super().read(ends)

    def _read_adopted(self, rows: Seq[int]) -> None:
        """Reads the pages of shared prefixes that nobody has read yet, each once, however many have it."""
        while any(self._states[row].waiting() for row in rows):
            taken, spans = list[PageNote](), list[Span]()
            for row in rows:
                run = list[PageNote]()
                for note in self._states[row].waiting():
                    # What comes behind a page that is being read for another row waits for it.
                    is_next = not run or note.start == run[-1].end
                    if note in taken or not is_next or len(run) >= self._MOST_PAGES:
                        break
                    run.append(note)
                if run:
                    spans.append(Span(row, run[0].start, run[-1].end))
                    taken += run
            self._eagle.fuse([note.features for note in taken])
            features = [note.features.fused(note.start, note.end) for note in taken]
            self._eagle.run([self.segment(span) for span in spans], torch.cat(features), int_tensor([], self.device))
            # Not before: where that has failed, others find the page as it was.
            for note in taken:
                note.read_to(note.end)

    def expand_root(self) -> NextLogits:
        # Outputs of all expanded nodes in their order, the root first.
        self._hidden_BXD = self.catch_up()[:, None]
        return self._next(self._hidden_BXD)

    def expand(self, tokens_BW: Tensor, parents_BW: Tensor, depth: int) -> NextLogits:
        segments, live = self.level(tokens_BW, parents_BW, depth)
        size = self._hidden_BXD.shape[2]
        features_BWD = self._hidden_BXD.gather(1, parents_BW[..., None].expand(-1, -1, size))
        if len(live) < len(features_BWD):
            features_BWD = features_BWD[int_tensor(live, self.device)]
        hidden_BWD = self.spread(self._eagle.run(segments, features_BWD.flatten(0, 1)).view_as(features_BWD), live)
        self._hidden_BXD = torch.cat([self._hidden_BXD, hidden_BWD], 1)
        return self._next(hidden_BWD)

    def confidence_tree(self, max_nodes: int, depth: int, k: int) -> Grown | None:
        if not self._eagle.grows_at_once:
            return None
        states_BD = self.catch_up()
        roots = [
            growing_root(table, total, limit)
            for table, total, limit in zip(self.tables, self._num_entries, self.limits, strict=True)
        ]
        trees = self._eagle.confidence_trees(roots, states_BD, max_nodes - 1, depth, k)
        return None if trees is None else _grown(trees, self.roots_B, self.vocab_size)

    def run_chunk(self, segments: list[Segment], spans: list[Span], rows_R: Tensor) -> Tensor:
        self._eagle.fuse([self._states[span.row].features for span in spans])
        features = torch.cat([self._states[span.row].features.take(span.start, span.end) for span in spans])
        states = self._eagle.run(segments, features, rows_R)
        for span in spans:
            self._states[span.row].read_to(span.end)
        return states

    def _next(self, hidden_BWD: Tensor) -> NextLogits:
        return NextLogits(self, *self._eagle.answer(hidden_BWD))


def growing_root(table: PageTable | TableView, num_entries: int, limit: int) -> GrowingRoot:
    """A root behind `num_entries` entries (its own is the last of them)."""
    first = table.first_slot
    if first is not None:
        return GrowingRoot(limit, num_entries - 1, num_entries, first, None)
    return GrowingRoot(limit, num_entries - 1, num_entries, None, table.slots("cpu"))


def _grown(trees: GrownTrees, roots_B: Tensor, vocab_size: int) -> Grown:
    """The trees with their roots."""
    width = int(trees.num_nodes_B.max())
    inside_BN = torch.arange(width) < trees.num_nodes_B[:, None]
    tokens_BN = torch.cat([roots_B[:, None], trees.tokens_BN[:, :width]], 1)
    parents_BN = pad(torch.where(inside_BN, trees.parents_BN[:, :width], -1), (1, 0), value=-1)
    expanded_BN = pad(torch.where(inside_BN, trees.expanded_BN[:, :width], -1), (1, 0))
    confidence_BN = pad(trees.confidence_BN[:, :width], (1, 0), value=torch.nan)
    tree = TokenTree.from_parents(tokens_BN, parents_BN, 1 + trees.num_nodes_B, vocab_size, confidence_BN)
    return Grown(tree, expanded_BN)


def check_fit(head: EagleHead, target: PagedModel) -> None:
    """Raises ValueError unless the head reads this target's hidden states and drafts its tokens."""
    config = head.config
    beyond = [layer for layer in config.feature_layers if not 0 <= layer <= target.num_layers]
    ids = head.draft_to_target_R
    if config.target_hidden_size != target.hidden_size:
        found = f"hidden states of size {config.target_hidden_size}, not {target.hidden_size}"
    elif config.vocab_size != target.vocab_size:
        found = f"a vocabulary of {config.vocab_size} tokens, not {target.vocab_size}"
    elif beyond:
        found = f"hidden state {beyond[0]}, and the last is {target.num_layers}"
    elif ids is not None and not 0 <= int(ids.min()) <= int(ids.max()) < target.vocab_size:
        found = f"token {int(ids.max())}, and the vocabulary has {target.vocab_size}"
    else:
        return
    raise ValueError(f"the EAGLE head is for {found} of target {target.name}: choose a head trained for this target")


def load(
    path: str,
    layer_ids: str | None = None,
    norm_before_residual: bool | None = None,
    draft_vocab_size: int | None = None,
    token_frequencies: str | None = None,
    int8: bool = True,
) -> EagleDrafter:
    """A drafter from a checkpoint of any known format, over the `draft_vocab_size` most frequent tokens (None: all); options
    as in `load_head`, `frequent_tokens`, whose errors it raises, and `EagleDrafter`."""
    source = HeadSource(path, EagleHead, layer_ids=layer_ids, norm_before_residual=norm_before_residual)
    return EagleDrafter(source, frequent_tokens(source.folder, draft_vocab_size, token_frequencies), int8)


def _run_once(head: EagleHead) -> None:
    config, like = head.config, head.fc.weight
    features = head.fuse([like.new_zeros(1, config.target_hidden_size)] * len(config.feature_layers))
    embeddings, first = like.new_zeros(1, config.hidden_size), torch.zeros(1, dtype=torch.int64, device=like.device)
    head.logits(head(embeddings, features, first, lambda query, key, value: query), lambda hidden_TD: hidden_TD)
