"""The protocols everything speaks: who proposes, who scores, who accepts, and where chance comes from."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from specdec.noise import Key, RoundKey
from specdec.tree import TokenTree, TreeSpec

if TYPE_CHECKING:
    from specdec.kv_cache import KVCache
    from specdec.metrics import StepTimes
    from specdec.model import PagedModel
    from specdec.pages import PagePool
    from specdec.scheduler import Plan
    from specdec.sequence import Sequence
    from specdec.states import PickedStates


@runtime_checkable
class Noise(Protocol):
    """The only source of chance. `rows` are the batch rows that `prob_B` or `probs_BV` belong to."""

    def bernoulli(self, prob_B: Tensor, key: RoundKey, rows: Tensor) -> Tensor:
        """True iff u < prob, strictly."""
        ...

    def categorical(self, probs_BV: Tensor, key: Key, rows: Tensor) -> Tensor:
        """One token id per row, never one of probability zero."""
        ...


@runtime_checkable
class TargetLaws(Protocol):
    """The target's processed next-token laws at the nodes of a batch of trees, float32 or float64."""

    def at(self, nodes_B: Tensor) -> Tensor:
        """Laws [B, V] at one node per row."""
        ...

    def all(self) -> Tensor:
        """Laws [B, N, V] at every node."""
        ...


@dataclass(frozen=True)
class Acceptance:
    """A rule's verdict: `path_BK` accepted node indices, root first, -1 padded; `num_accepted_B` drafted tokens accepted
    (the root not counted); `next_token_B` the one extra token."""

    path_BK: Tensor
    num_accepted_B: Tensor
    next_token_B: Tensor


class AcceptanceRule(Protocol):
    """Which drafted tokens stay. `lossless` rules keep the target's law for every tree that they accept."""

    name: str
    lossless: bool

    def accepts(self, spec: TreeSpec) -> str | None:
        """None, or why this rule would not be exact for such trees."""
        ...

    def __call__(self, tree: TokenTree, laws: TargetLaws, noise: Noise) -> Acceptance: ...


@dataclass(frozen=True)
class ForwardResult:
    """What one forward of the target gave: `logits_RV` of the wanted rows and, per asked-for layer, the hidden states
    [T, D] of every packed token (0: embeddings, i: output of layer i)."""

    logits_RV: Tensor
    hidden: dict[int, Tensor]


@dataclass(frozen=True)
class Commit:
    """Tokens of one sequence that went through the target and are final.

    `token_ids` lie at positions `start`, `start` + 1, ...; `next_token` follows them, is final too and has not been
    through the target yet (the next root). `nodes` are their node indices in the last proposed tree (root first; None for
    a prompt chunk, and for tokens that this drafter did not draft), `hidden` the target's states of exactly these tokens for
    each of the drafter's `feature_layers`. With its `sequence` a drafter can read along on the pages; without (None) it reads
    when it is asked for a tree, which after the last tokens of a request it never is: those may complete a page for others.
    """

    sequence_id: int
    start: int
    token_ids: list[int]
    next_token: int
    nodes: list[int] | None
    hidden: Mapping[int, Tensor]
    sequence: Sequence | None = None


@runtime_checkable
class Drafter(Protocol):
    """Proposes token trees: what every drafter must have. `feature_layers`: the hidden states of the target that it wants to
    observe. Without what `PagedDrafter` has besides it is taken to keep nothing on the pages."""

    feature_layers: tuple[int, ...]

    def observe(self, commits: Seq[Commit]) -> None:
        """These tokens are final."""
        ...

    def propose(self, sequences: Seq[Sequence], policy: TreePolicy, noise: Noise) -> TokenTree:
        """A tree behind each sequence's root; asked again for the same root, the drafter forgets the tree before."""
        ...

    def forget(self, sequence_ids: Seq[int]) -> None:
        """These sequences have ended, or will be observed from their beginning again."""
        ...


@runtime_checkable
class PagedDrafter(Drafter, Protocol):
    """A drafter that may keep state on the target's pages. This is shared with them; what it needs besides goes with each page
    as a note. `covers_unasked`: whether all that it observes can be shared, though it is never asked for a tree."""

    @property
    def covers_unasked(self) -> bool: ...

    def bind(self, target: PagedModel, pool: PagePool) -> None:
        """Called once per engine, before anything else; raises ValueError where drafter and target do not fit."""
        ...

    def covered(self, sequence_id: int) -> int:
        """So many first positions could be shared: what it has of them is on the pages and in their notes; `sys.maxsize` where
        it keeps nothing of them."""
        ...

    def note(self, sequence_id: int, end: int) -> object:
        """What goes with the page that ends before position `end`, which is covered; asked once for a page."""
        ...

    def adopt(self, sequence: Sequence, num_positions: int, notes: Seq[Any]) -> None:
        """A sequence begins, again perhaps, whose first positions came on shared pages with their `notes`: these are never
        observed."""
        ...

    def num_unread(self, sequence: Sequence) -> int:
        """Final tokens that it would run, the root among them, were it asked for a tree now; at least 1."""
        ...


class TreePolicy(Protocol):
    """How a tree grows. `spec` says what its trees are; `max_depth` and `max_nodes` bound them (root included); while it
    grows, at most `max_expanded` nodes are run through a draft model."""

    spec: TreeSpec
    max_depth: int
    max_nodes: int
    max_expanded: int


@dataclass(frozen=True)
class Verdict:
    """What one step decided, a row per verifying sequence in tree order.

    `paths` are the accepted node indices, root first; `tokens` the new final tokens, the extra one last; `logprobs` per
    token where asked for, as `sampling.token_logprobs` gives them. `hidden` holds per computed sequence the asked-for
    states of its chunk and accepted path.
    """

    paths: list[list[int]]
    tokens: list[list[int]]
    logprobs: list[list[tuple[float, dict[int, float]]] | None]
    hidden: dict[int, PickedStates] = field(default_factory=dict)


class Speculation(Protocol):
    """Decides step by step how much is drafted, and learns from what became of it."""

    def propose(self, step: Plan, drafter: PagedDrafter, policy: TreePolicy, noise: Noise) -> TokenTree:
        """Trees of `step.drafting`: the policy's, smaller ones, or roots alone; `noise` has their rows.

        What is drawn may be decided on by the past alone; only trees without drawn nodes may be pruned once drafted.
        """
        ...

    def learn(self, step: Plan, tree: TokenTree | None, verdict: Verdict, seconds: float) -> None:
        """What the step's trees, those of `step.verifying`, were worth; to draft, verify, emit and observe took `seconds`."""
        ...


class Verifier(Protocol):
    """Runs prompt chunks and trees through one forward of the target and settles them by its rule."""

    target: PagedModel

    def require(self, spec: TreeSpec) -> None:
        """Raises ValueError where the rule would not be exact for such trees."""
        ...

    def new_cache(self, pool: PagePool) -> KVCache: ...

    def verify(
        self,
        plan: Plan,
        tree: TokenTree | None,
        noise: Noise,
        cache: KVCache,
        feature_layers: tuple[int, ...],
        times: StepTimes,
    ) -> Verdict: ...
