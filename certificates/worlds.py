"""Small worlds: laws as tables over contexts, served to rules, policies and the whole engine.

`FixedLaws` serves them as target laws, `TableRound` as a drafter's round, `ToyModel` as a language model over real pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.interfaces import ForwardResult
from specdec.kv_cache import KVCache, LayerShape
from specdec.model import Segment
from specdec.pages import PagePool
from specdec.tree import TokenTree

TokenSpan = tuple[int, ...]


class WrongContextError(AssertionError):
    """A token of the toy model sees other tokens, or other positions, than those of its own context."""


@dataclass(frozen=True)
class World:
    """Target and draft laws [K, C, V] of K kinds as tables over contexts; a token leads to context `next_CV` (-1: out)."""

    kinds: tuple[str, ...]
    target_KCV: Tensor
    draft_KCV: Tensor
    next_CV: Tensor

    @property
    def vocab_size(self) -> int:
        return self.target_KCV.shape[2]

    def walk(self, tokens: Iterable[int], state: int = 0) -> int:
        for token in tokens:
            state = int(self.next_CV[state, token])
        return state

    def select(self, *kinds: str) -> World:
        """The world of some kinds alone, numbered in the given order."""
        index = [self.kinds.index(kind) for kind in kinds]
        return World(kinds, self.target_KCV[index], self.draft_KCV[index], self.next_CV)

    def continued_error(self, kind: int, state: int, law: dict[TokenSpan, float], length: int) -> float:
        """The largest error of the joint law of `length` tokens, where the target's own law goes on behind each span."""
        return max(abs(error) for error in self._continued_errors(kind, state, law, length))

    def continued_variation(self, kind: int, state: int, law: dict[TokenSpan, float], length: int) -> float:
        """The total variation of the same joint laws: the most by which the probability of any event differs."""
        return sum(abs(error) for error in self._continued_errors(kind, state, law, length)) / 2

    def _continued_errors(self, kind: int, state: int, law: dict[TokenSpan, float], length: int) -> Iterator[float]:
        mass: dict[TokenSpan, float] = {}
        for span, prob in law.items():
            mass[span[:length]] = mass.get(span[:length], 0.0) + prob
        following = self.next_CV.tolist()

        def below(prefix: TokenSpan, at: int, wanted: float, found: float) -> Iterator[float]:
            if len(prefix) == length:
                yield found - wanted
                return
            for token, p in enumerate(self.target_KCV[kind, at].tolist()):
                longer = (*prefix, token)
                yield from below(longer, following[at][token], wanted * p, found * p + mass.get(longer, 0.0))

        return below((), state, 1.0, 0.0)

    def continued(self, kind: int, state: int, span: TokenSpan, length: int) -> dict[TokenSpan, float]:
        """The law of `length` tokens that begin with `span`, the target's own behind it."""
        span = span[:length]
        behind = self.stopped_law(kind, self.walk(span, state), length - len(span))
        return {span + rest: prob for rest, prob in behind.items()}

    def stopped_law(self, kind: int, state: int, length: int, stop: Iterable[int] = ()) -> dict[TokenSpan, float]:
        """The target's law of up to `length` tokens, ended by a stop token."""
        ends, done = set(stop), dict[TokenSpan, float]()
        going: dict[TokenSpan, tuple[int, float]] = {(): (state, 1.0)}
        for _ in range(length):
            longer: dict[TokenSpan, tuple[int, float]] = {}
            for prefix, (at, prob) in going.items():
                for token, p in enumerate(self.target_KCV[kind, at].tolist()):
                    span = (*prefix, token)
                    if p > 0 and token in ends:
                        done[span] = prob * p
                    elif p > 0:
                        longer[span] = (int(self.next_CV[at, token]), prob * p)
            going = longer
        return done | {prefix: prob for prefix, (_, prob) in going.items()}

    @staticmethod
    def tree(vocab: int, depth: int, seed: int = 0) -> World:
        """Every context of up to `depth` tokens has laws of its own."""
        inner = (vocab**depth - 1) // (vocab - 1)
        size = inner + vocab**depth
        following = torch.arange(size)[:, None] * vocab + torch.arange(vocab) + 1
        target, draft = _laws(size, vocab, seed)
        return World(KINDS, target, draft, torch.where(following < size, following, -1))

    @staticmethod
    def markov(vocab: int, order: int, seed: int = 0) -> World:
        """The last `order` tokens decide the laws, so contexts may be as long as they like."""
        size = vocab**order
        following = torch.arange(size)[:, None] * vocab + torch.arange(vocab)
        target, draft = _laws(size, vocab, seed)
        return World(KINDS, target, draft, following % size)


# How draft and target relate; the adjective is the target's, where only one is named.
KINDS = (
    "sharp",
    "flat",
    "close",
    "independent",
    "zeros",
    "disjoint",
    "equal",
    "one_hot",
    "one_hot_target",
    "one_hot_draft",
    "silent_draft",
)


def _laws(size: int, vocab: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def soft(scale: float) -> Tensor:
        return (scale * torch.randn(size, vocab, generator=generator, dtype=torch.float64)).softmax(-1)

    def hot() -> Tensor:
        tokens = torch.randint(vocab, (size,), generator=generator)
        return torch.nn.functional.one_hot(tokens, vocab).double()

    def chance(prob: float) -> Tensor:
        return torch.rand(size, vocab, generator=generator, dtype=torch.float64) < prob

    def normalise(laws: Tensor) -> Tensor:
        return laws / laws.sum(-1, keepdim=True)

    def holes(keep: Tensor) -> Tensor:
        return normalise(soft(1.0) * keep)

    near = soft(1.0)
    kept = hot().bool() | chance(0.5)
    same = soft(1.0)
    first = hot()
    # Half of the one-hot drafts agree with a one-hot target.
    second = torch.where(chance(0.5)[:, :1], first, hot())
    pairs = {
        "sharp": (soft(3.0), soft(3.0)),
        "flat": (soft(0.1), soft(0.1)),
        "close": (near, normalise(near * (1 + 0.01 * soft(1.0)))),
        "independent": (soft(1.0), soft(1.0)),
        "zeros": (holes(kept), holes(hot().bool() | chance(0.5))),
        "disjoint": (holes(~first.bool()), first),
        "equal": (same, same),
        "one_hot": (first, second),
        "one_hot_target": (hot(), soft(1.0)),
        "one_hot_draft": (soft(1.0), hot()),
        "silent_draft": (soft(1.0), soft(1.0) * chance(0.5)[:, :1]),
    }
    target, draft = zip(*(pairs[kind] for kind in KINDS), strict=True)
    return torch.stack(target), torch.stack(draft)


class FixedLaws:
    """Target laws from a table: row b is of kind `kinds_B[b]`, its root in context `states_B[b]`."""

    def __init__(self, world: World, tree: TokenTree, kinds_B: Tensor, states_B: Tensor) -> None:
        self._laws_KCV, self._kinds_B, self._tree = world.target_KCV, kinds_B, tree
        states = [states_B]
        for node in range(1, tree.max_nodes):
            parents = tree.parents_BN[:, node : node + 1].clamp_min(0)
            states.append(world.next_CV[torch.stack(states, 1).gather(1, parents)[:, 0], tree.tokens_BN[:, node]])
        self._states_BN = torch.stack(states, 1)

    def at(self, nodes_B: Tensor) -> Tensor:
        assert bool(self._tree.is_node_BN.gather(1, nodes_B[:, None]).all()), "the law of a padding node was asked for"
        states = self._states_BN.gather(1, nodes_B[:, None])[:, 0]
        assert bool((states >= 0).all()), "the tree is deeper than the table"
        return self._laws_KCV[self._kinds_B, states]

    def all(self) -> Tensor:
        laws = self._laws_KCV[self._kinds_B[:, None], self._states_BN]
        return laws * self._tree.is_node_BN[..., None]


class TableRound:
    """A drafter's round that answers from the world's draft laws; checks what the policies tell it."""

    def __init__(self, world: World, kinds_B: Tensor, states_B: Tensor, limits: Seq[int]) -> None:
        self.world, self.kinds_B, self.limits = world, kinds_B, list(limits)
        self.vocab_size = world.vocab_size
        # Roots are told apart from drafted tokens by nobody, so any token serves.
        self.roots_B = states_B % world.vocab_size
        self.states_BX = states_B[:, None]
        self.depths_X = [0]

    def expand_root(self) -> TableNext:
        return TableNext(self, self.states_BX)

    def expand(self, tokens_BW: Tensor, parents_BW: Tensor, depth: int) -> TableNext:
        assert bool((parents_BW >= 0).all() & (parents_BW < self.states_BX.shape[1]).all()), (
            "a parent was never expanded"
        )
        assert depth <= max(self.limits), f"no row can use a child at depth {depth + 1}"
        depths = torch.tensor(self.depths_X)[parents_BW]
        assert bool((depths == depth - 1).all()), f"parents lie at depths {depths.tolist()}, their children at {depth}"
        states_BW = self.world.next_CV[self.states_BX.gather(1, parents_BW), tokens_BW]
        assert bool((states_BW >= 0).all()), "the tree is deeper than the table"
        self.states_BX = torch.cat([self.states_BX, states_BW], 1)
        self.depths_X += [depth] * tokens_BW.shape[1]
        return TableNext(self, states_BW)


class TableNext:
    def __init__(self, draft: TableRound, states_BW: Tensor) -> None:
        self._draft, self._states_BW = draft, states_BW
        self._laws_BWV = draft.world.draft_KCV[draft.kinds_B[:, None], states_BW]

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        size = self._laws_BWV.shape[-1]
        best = self._laws_BWV.log().sort(dim=-1, descending=True, stable=True)
        pad = torch.nn.functional.pad
        missing = max(k - size, 0)
        return pad(best.indices[..., :k], (0, missing)), pad(best.values[..., :k], (0, missing), value=-torch.inf)

    def laws(self, paths_BWK: Tensor) -> Tensor:
        states = self._draft.states_BX[:, :1].expand_as(self._states_BW)
        for level in paths_BWK.unbind(2):
            states = torch.where(level >= 0, self._draft.world.next_CV[states, level.clamp_min(0)], states)
        assert torch.equal(states, self._states_BW), "paths and expanded nodes disagree"
        return self._laws_BWV


class ToyModel:
    """A language model over real pages whose only key is the token itself, so its law is that of the very tokens it sees.

    The first token of a sequence names the kind of the world's laws. Stands in for PagedModel, as target or as draft; its
    hidden states, which learned drafters read, are random and different for every context, so they too are of those tokens.
    Raises WrongContextError where a token sees slots that were never written, or positions other than 0, 1, ..., its own.
    """

    device = torch.device("cpu")
    dtype = torch.float64
    tokenizer = None
    max_positions: int | None = None
    eos_token_ids: frozenset[int] = frozenset()
    num_layers = 1
    hidden_size = 4

    def __init__(self, world: World, laws_KCV: Tensor, name: str = "toy") -> None:
        self.name, self.vocab_size = name, world.vocab_size
        generator = torch.Generator().manual_seed(0)
        self._hidden_LKCD, self._embeddings_VD = (
            torch.randn(*shape, self.hidden_size, generator=generator, dtype=self.dtype)
            for shape in ((self.num_layers + 1, *laws_KCV.shape[:2]), (self.vocab_size,))
        )
        self._logits_KCV, self._next = laws_KCV.log(), world.next_CV.tolist()

    def new_cache(self, pool: PagePool) -> KVCache:
        return KVCache(pool, [LayerShape(1, 1, 1)], self.dtype, self.device)

    def embed(self, token_ids_T: Tensor) -> Tensor:
        return self._embeddings_VD[token_ids_T]

    def lm_head(self, hidden_TD: Tensor) -> Tensor:
        return hidden_TD @ self._embeddings_VD.T

    def forward(
        self, segments: Seq[Segment], cache: KVCache, wanted_rows: Tensor | None = None, hidden_layers: Seq[int] = ()
    ) -> ForwardResult:
        keys = cache.layer(0)[0][:, 0, 0]
        layouts, new = [], list[int]()
        for segment in segments:
            own = segment.positions_Q.tolist()
            tail = own if segment.tail_positions_M is None else segment.tail_positions_M.tolist()
            slots: list[int] = segment.table.slots("cpu")[: segment.visible_len + len(tail)].tolist()
            new += slots[len(slots) - len(own) :]
            layouts.append((segment, slots, own, [*range(segment.visible_len), *tail]))
        # One more than the token, so that 0 is a slot that nobody has written.
        keys[new] = torch.cat([segment.token_ids_Q for segment in segments]).double() + 1
        written = keys.long().tolist()
        kinds, states = [], []
        for segment, slots, own, positions in layouts:
            mask = None if segment.tail_mask_QM is None else segment.tail_mask_QM.tolist()
            for query, position in enumerate(own):
                end = len(slots) - len(own) + query + 1
                if mask is None:
                    seen = [*range(end)]
                else:
                    seen = [i for i in range(end) if i < segment.visible_len or mask[query][i - segment.visible_len]]
                    if any(mask[query][end - segment.visible_len :]):
                        raise WrongContextError("a token sees one behind it")
                    seen.sort(key=positions.__getitem__)
                at = [positions[i] for i in seen]
                if at != [*range(position + 1)]:
                    raise WrongContextError(f"a token at position {position} sees positions {at}")
                tokens = [written[slots[i]] - 1 for i in seen]
                if min(tokens) < 0:
                    raise WrongContextError("a slot was read that nobody has written")
                state = 0
                for token in tokens[1:]:
                    state = self._next[state][token]
                kinds.append(tokens[0])
                states.append(state)
        kinds_T, states_T = torch.tensor(kinds), torch.tensor(states)
        rows = torch.arange(len(states)) if wanted_rows is None else wanted_rows
        hidden = {layer: self._hidden_LKCD[layer, kinds_T, states_T] for layer in hidden_layers}
        return ForwardResult(self._logits_KCV[kinds_T[rows], states_T[rows]], hidden)
