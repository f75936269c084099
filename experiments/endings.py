"""Why each accepted path ended where it did, and at what kind of token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from specdec.interfaces import Acceptance, Noise, TargetLaws
from specdec.tree import TokenTree
from specdec.verifiers import Follow

# In this order: the first that holds. `undrafted`: a root alone, as behind the prompt; `uncovered`: the token is outside the
# draft vocabulary; `deepest`: no deeper level was allowed; `leaf`: the tree had no child there; `wrong`: it had others.
REASONS = ("undrafted", "uncovered", "deepest", "leaf", "wrong")
MISSED = ("uncovered", "leaf", "wrong")
KINDS = ("after a newline", "number", "punctuation", "word", "inside a word")


@dataclass(frozen=True)
class Ending:
    """One verified tree: how many drafted tokens were accepted, and whether the last of them had children."""

    num_accepted: int
    num_nodes: int
    is_leaf: bool


class Recorder(Follow):
    """`follow`, taking notes."""

    def __init__(self) -> None:
        self._endings: list[Ending] = []

    def __call__(self, tree: TokenTree, laws: TargetLaws, noise: Noise) -> Acceptance:
        acceptance = super().__call__(tree, laws, noise)
        assert tree.batch_size == 1, "notes are of one sequence"
        accepted, num_nodes = int(acceptance.num_accepted_B[0]), int(tree.num_nodes_B[0])
        last = acceptance.path_BK[0, accepted]
        is_leaf = not bool((tree.parents_BN[0, :num_nodes] == last).any())
        self._endings.append(Ending(accepted, num_nodes, is_leaf))
        return acceptance

    def taken(self) -> list[Ending]:
        """The notes since this was last asked for."""
        taken, self._endings = self._endings, []
        return taken


@dataclass
class Endings:
    """Counts over texts. `texts` holds every token's text; `vocabulary` the tokens that can be drafted (None: all)."""

    texts: Seq[str]
    vocabulary: frozenset[int] | None
    max_depth: int
    ends: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    uncovered: Counter[str] = field(default_factory=Counter)

    def add(self, token_ids: Seq[int], endings: Seq[Ending]) -> None:
        """Takes in a text and the endings of its trees, in order; what was cut off behind the text counts nowhere."""
        before = [None, *token_ids]
        for token, previous in zip(token_ids, before, strict=False):
            kind = self._kind(token, previous)
            self.tokens[kind] += 1
            self.uncovered[kind] += not self._is_covered(token)
        at = 0
        for ending in endings:
            at += ending.num_accepted
            if at >= len(token_ids):
                break
            reason = self._reason(ending, token_ids[at])
            self.ends[reason] += 1
            self.missed[self._kind(token_ids[at], before[at])] += reason in MISSED
            at += 1

    def fields(self, num_target_forwards: int) -> dict[str, Any]:
        """What a row holds of it. `tau_if_covered` bounds what a whole vocabulary could give: as if every path that ended at an
        uncovered token had gone on into the next forward's."""
        num_tokens, num_uncovered = self.tokens.total(), self.uncovered.total()
        kinds = {
            kind: {"tokens": self.tokens[kind], "missed": self.missed[kind], "uncovered": self.uncovered[kind]}
            for kind in KINDS
        }
        return {
            "draft_vocab_size": len(self.texts) if self.vocabulary is None else len(self.vocabulary),
            "covered": 1 - num_uncovered / num_tokens,
            "ends": {reason: self.ends[reason] for reason in REASONS},
            "tau_if_covered": num_tokens / (num_target_forwards - self.ends["uncovered"]),
            "kinds": kinds,
        }

    def _is_covered(self, token: int) -> bool:
        return self.vocabulary is None or token in self.vocabulary

    def _reason(self, ending: Ending, token: int) -> str:
        if ending.num_nodes == 1:
            return "undrafted"
        if not self._is_covered(token):
            return "uncovered"
        if not ending.is_leaf:
            return "wrong"
        return "deepest" if ending.num_accepted == self.max_depth else "leaf"

    def _kind(self, token: int, previous: int | None) -> str:
        text = self.texts[token]
        if previous is not None and self.texts[previous].endswith("\n"):
            return "after a newline"
        if any(letter.isdigit() for letter in text):
            return "number"
        if not any(letter.isalpha() for letter in text):
            return "punctuation"
        return "inside a word" if text[0].isalpha() else "word"
