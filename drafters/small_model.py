"""A small causal LM as drafter: its own keys and values on the target's pages, trees by any policy."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.drafters.growth import GrowingPolicy
from specdec.interfaces import Commit, Noise, TreePolicy
from specdec.kv_cache import KVCache
from specdec.model import PagedModel, Segment
from specdec.pages import PagePool, PageTable
from specdec.sampling import BatchSampling, log_confidence
from specdec.sequence import Sequence, batch_sampling
from specdec.tree import TokenTree


@dataclass
class _State:
    """How far the draft model has computed a sequence, and where it ran the nodes of the last tree."""

    table: PageTable
    num_computed: int = 0
    expanded: list[int] = field(default_factory=list)


class SmallModelDrafter:
    """Drafts with a smaller model of the target's vocabulary (Leviathan et al. 2023, section 2; trees as in Miao et al. 2023).

    Its keys and values lie in the same slots as the target's, in tensors of its own: the page tables are shared. Raises
    ValueError where the vocabularies differ, naming both sizes.
    """

    feature_layers: tuple[int, ...] = ()
    _CHUNK = 512

    def __init__(self, model: PagedModel) -> None:
        self.model = model
        self.vocab_size = model.vocab_size
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
        """Moves the accepted nodes it has run to their positions; tokens it has not run are caught up in `propose`."""
        source, target = [], []
        for commit in commits:
            state = self._states.get(commit.sequence_id)
            if state is None or commit.nodes is None or not state.expanded:
                continue
            for depth, node in enumerate(commit.nodes[1:], 1):
                if state.expanded[node] < 0:
                    break
                source.append(state.table.slot(commit.start + state.expanded[node]))
                target.append(state.table.slot(commit.start + depth))
                state.num_computed = commit.start + depth + 1
            state.expanded = []
        self.cache.move(source, target)

    def propose(self, sequences: Seq[Sequence], policy: TreePolicy, noise: Noise) -> TokenTree:
        if not isinstance(policy, GrowingPolicy):
            raise ValueError(f"drafter small_model cannot follow the policy {type(policy).__name__}")
        limits = [self._limit(one) for one in sequences]
        if not any(limits):
            return TokenTree.roots(
                torch.tensor([one.root for one in sequences], device=self.model.device), self.vocab_size
            )
        grown = policy.grow(_ModelRound(self, sequences, limits), noise)
        for one, expanded in zip(sequences, grown.expanded_BN.tolist(), strict=True):
            self._states[one.id].expanded = expanded
        return grown.tree

    def forget(self, sequence_ids: Seq[int]) -> None:
        for sequence_id in sequence_ids:
            self._states.pop(sequence_id, None)

    def state(self, sequence: Sequence) -> _State:
        return self._states.setdefault(sequence.id, _State(sequence.table))

    def _limit(self, sequence: Sequence) -> int:
        limit = sequence.max_draft_depth
        if self.model.max_positions is not None:
            # The deepest level is never run through the draft model, so it may lie one position further.
            limit = min(limit, self.model.max_positions - sequence.root_position)
        return max(limit, 0)


class _ModelRound:
    """One round: catches the draft model up to the root, then runs the tree's nodes level by level."""

    def __init__(self, drafter: SmallModelDrafter, sequences: Seq[Sequence], limits: list[int]) -> None:
        self._drafter, self._sequences, self.limits = drafter, sequences, limits
        self.device, self.vocab_size = drafter.model.device, drafter.vocab_size
        self.roots_B = torch.tensor([one.root for one in sequences], device=self.device)
        self._first_B = torch.tensor([len(one.token_ids) for one in sequences], device=self.device)
        # Expanded nodes behind the root: who is an ancestor of whom (itself included), and at what depth.
        batch = len(sequences)
        self._ancestors_BXX = torch.zeros(batch, 0, 0, dtype=torch.bool, device=self.device)
        self._depths: list[int] = []
        self._sampling: BatchSampling | None = None

    def expand_root(self) -> _ModelNext:
        return _ModelNext(self, self._catch_up())

    def expand(self, tokens_BW: Tensor, parents_BW: Tensor, depth: int) -> _ModelNext:
        batch, width = tokens_BW.shape
        old = self._ancestors_BXX.shape[1]
        # Column 0 stands for the root, which everybody sees as part of the context.
        above = torch.nn.functional.pad(self._ancestors_BXX, (0, 0, 1, 0))
        inherited = above.gather(1, parents_BW[..., None].expand(-1, -1, old))
        own = torch.eye(width, dtype=torch.bool, device=self.device).expand(batch, -1, -1)
        mask_BWM = torch.cat([inherited, own], 2)
        self._ancestors_BXX = torch.cat([torch.nn.functional.pad(self._ancestors_BXX, (0, width)), mask_BWM], 1)
        self._depths += [depth] * width
        positions_BM = self._first_B[:, None] - 1 + torch.tensor(self._depths, device=self.device)
        # A row that may not go deeper than this has no use for the nodes, nor perhaps a position.
        live = [row for row, limit in enumerate(self.limits) if limit > depth]
        segments = [
            Segment(
                self._sequences[row].table,
                len(self._sequences[row].token_ids),
                self._readable(tokens_BW[row]),
                positions_BM[row, old:],
                mask_BWM[row],
                positions_BM[row],
            )
            for row in live
        ]
        logits_RV = self._drafter.model.forward(segments, self._drafter.cache).logits_RV
        return _ModelNext(self, self._spread(logits_RV.view(len(live), width, -1), live))

    def laws(self, logits_BWV: Tensor, paths_BWK: Tensor) -> Tensor:
        if self._sampling is None:
            self._sampling = batch_sampling(self._sequences, self.vocab_size, self.device)
        batch, width, vocab = logits_BWV.shape
        rows = torch.arange(batch, device=self.device).repeat_interleave(width)
        probs = self._sampling.probabilities(logits_BWV.reshape(-1, vocab), rows, paths_BWK.flatten(0, 1))
        return probs.view(batch, width, vocab)

    def _catch_up(self) -> Tensor:
        """Runs what the draft model has not seen, the root last, in chunks; logits [B, 1, V] at the roots."""
        live = [row for row, limit in enumerate(self.limits) if limit > 0]
        at_root: dict[int, Tensor] = {}
        while len(at_root) < len(live):
            segments, ends, owners, packed = [], [], [], 0
            for row in live:
                if row in at_root:
                    continue
                one = self._sequences[row]
                state = self._drafter.state(one)
                # The root is run again where a tree has been grown from it before: its logits are wanted once more.
                start = min(state.num_computed, len(one.token_ids) - 1)
                end = min(len(one.token_ids), start + self._drafter._CHUNK)
                tokens = self._readable(torch.tensor(one.token_ids[start:end], device=self.device))
                segments.append(Segment(one.table, start, tokens, torch.arange(start, end, device=self.device)))
                packed += end - start
                state.num_computed = end
                if end == len(one.token_ids):
                    ends.append(packed - 1)
                    owners.append(row)
            rows = torch.tensor(ends, dtype=torch.int64, device=self.device)
            result = self._drafter.model.forward(segments, self._drafter.cache, rows)
            at_root.update(zip(owners, result.logits_RV, strict=True))
        return self._spread(torch.stack([at_root[row] for row in live])[:, None], live)

    def _readable(self, tokens: Tensor) -> Tensor:
        # A target padded wider can emit an id that the draft model has no row for; any draft is as good behind it.
        return tokens.clamp_max(self._drafter.model.vocab_size - 1)

    def _spread(self, logits: Tensor, live: list[int]) -> Tensor:
        """Logits of the rows that ran, at their places in the batch; zeros elsewhere."""
        if len(live) == len(self._sequences):
            return logits
        out = logits.new_zeros(len(self._sequences), *logits.shape[1:])
        out[live] = logits
        return out


class _ModelNext:
    """Next-token logits of W nodes per sequence, as scores for confidence trees or as laws to draw from."""

    def __init__(self, draft: _ModelRound, logits_BWV: Tensor) -> None:
        self._draft, self._logits_BWV = draft, fit_vocabulary(logits_BWV, draft.vocab_size)

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        best = log_confidence(self._logits_BWV).topk(min(k, self._logits_BWV.shape[-1]))
        missing = k - best.indices.shape[-1]
        pad = torch.nn.functional.pad
        return pad(best.indices, (0, missing)), pad(best.values, (0, missing), value=-torch.inf)

    def laws(self, paths_BWK: Tensor) -> Tensor:
        return self._draft.laws(self._logits_BWV, paths_BWK)


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
    return logits if missing == 0 else torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)


def load(path: str, **options: object) -> SmallModelDrafter:
    """A drafter from a hub id, folder or GGUF file; options as in `specdec.loading.load_model`."""
    # How drafts round changes no text.
    return SmallModelDrafter(PagedModel.load(path, **{"numerics": "fast", **options}))
