"""The trees on which rules are certified: every way to draw, wide and deep, as far as enumeration goes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from specdec.certificates.policies import Alternating
from specdec.drafters import Mixed, Sampled, Static, TopK, chain
from specdec.drafters.growth import GrowingPolicy
from specdec.verifiers import RULES

LEVELS = ("quick", "full")
BUSHY = [[0], [1], [0, 0], [0, 1], [1, 0]]


@dataclass(frozen=True)
class Draft:
    """A policy with the vocabularies that its rounds are enumerated on and the tokens that the engine generates with it;
    policies that draw a lot get few of either. `quick` ones are in every run."""

    name: str
    policy: GrowingPolicy
    vocabs: tuple[int, ...] = (3,)
    length: int = 3
    quick: bool = False


DRAFTS = [
    Draft("chain(2)", chain(2), (3, 4, 5), length=4, quick=True),
    Draft("chain(4)", chain(4), (3, 4)),
    Draft("static(5)", Static([[0], [1], [0, 0], [1, 0]]), (3, 5), quick=True),
    Draft("static(6)", Static(BUSHY), (3, 4), length=4),
    Draft("static(8), depth 4", Static([*BUSHY, [0, 0, 0], [0, 0, 0, 1]])),
    Draft("top_k(6, 3, 2)", TopK(total=6, depth=3, k=2), (3, 4, 5), quick=True),
    Draft("top_k(8, 2, 4)", TopK(total=8, depth=2, k=4), (3, 5)),
    Draft("chain(2)", chain(2, "iid"), (3, 4, 5), length=4, quick=True),
    Draft("chain(3)", chain(3, "iid"), (3, 4)),
    Draft("chain(4)", chain(4, "iid")),
    Draft("sampled(3)", Sampled([3]), (3, 5)),
    Draft("sampled(2, 1)", Sampled([2, 1]), (3, 4), quick=True),
    Draft("sampled(2, 2)", Sampled([2, 2]), length=2),
    Draft("sampled(3, 1)", Sampled([3, 1]), length=2),
    Draft("chain(2)", chain(2, "without_replacement"), (3, 4, 5)),
    Draft("sampled(2, 1)", Sampled([2, 1], "without_replacement"), (3, 4), quick=True),
    Draft("sampled(2, 2)", Sampled([2, 2], "without_replacement"), length=2),
    Draft("sampled(3, 1)", Sampled([3, 1], "without_replacement"), length=2),
    Draft("mixed(2, 1)", Mixed([2, 1]), (3, 4, 5), quick=True),
    Draft("mixed(3, 2)", Mixed([3, 2]), (3, 4), length=2),
    Draft("mixed(2, 1, 1)", Mixed([2, 1, 1]), length=2),
    Draft("mixed(1, 1)", Mixed([1, 1]), (3, 4)),
    Draft("fixed-drawn-fixed", Alternating(3, starts_drawn=False), (3, 4), quick=True),
    Draft("drawn-fixed-drawn", Alternating(3, starts_drawn=True), (3, 4)),
]


def combinations(level: str, rules: Iterable[str] = ()) -> Iterator[tuple[str, Draft]]:
    """Every rule (all where none are named) with every policy whose trees it takes.

    Raises ValueError for a level or rule that there is not.
    """
    if level not in LEVELS:
        raise ValueError(f"level={level} is unknown; choose one of {', '.join(LEVELS)}")
    for name in rules:
        if name not in RULES:
            raise ValueError(f"rules={name} is unknown; choose from {', '.join(RULES)}")
    chosen = [draft for draft in DRAFTS if draft.quick or level == "full"]
    for name in list(rules) or RULES:
        yield from ((name, draft) for draft in chosen if RULES[name]().accepts(draft.policy.spec) is None)
