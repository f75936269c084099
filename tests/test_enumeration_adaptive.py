"""The law of adaptive speculation, by enumeration: exact, although what is drafted depends on what became of drafts before."""

from __future__ import annotations

import pytest

from specdec import SamplingParams
from specdec.certificates import checks
from specdec.certificates.checks import TOLERANCE, adaptive_error
from specdec.certificates.processes import engine_laws
from specdec.certificates.worlds import World
from specdec.drafters import Mixed, Sampled, TopK, chain
from specdec.drafters.adaptive import AdaptiveSpeculation
from specdec.drafters.growth import GrowingPolicy
from specdec.interfaces import AcceptanceRule
from specdec.verifiers import Block, Follow, Rejection, Traversal


@pytest.mark.parametrize("longest_habit", [0, 1])
@pytest.mark.parametrize(
    ("rule", "policy"),
    [
        (Rejection(), chain(2, "iid")),
        (Block(), chain(2, "iid")),
        (Traversal(), Sampled([2, 1], "without_replacement")),
        (Traversal(), Mixed([2, 1])),
        (Follow(), TopK(4, 2, 2)),
    ],
    ids=lambda value: getattr(value, "name", type(value).__name__),
)
def test_the_law_is_the_targets(rule: AcceptanceRule, policy: GrowingPolicy, longest_habit: int) -> None:
    assert adaptive_error(rule, policy, longest_habit) < TOLERANCE


class Shy:
    """Stands in for the payoff: behind every step that brought a drafted token comes one without drafts."""

    is_resting = False

    def __init__(self, rests: list[bool]) -> None:
        self._seen, self._rests_next = rests, False

    def rests(self, num_rows: int, has_prompts: bool) -> bool:
        rests, self._rests_next = self._rests_next, False
        self._seen.append(rests)
        return rests

    def saw_plain(self, *_: float) -> None:
        pass

    def saw_drafts(self, num_rows: int, num_tokens: int, *_: float) -> None:
        self._rests_next = num_tokens > num_rows


@pytest.mark.parametrize(
    ("rule", "policy"), [(Rejection(), chain(2, "iid")), (Traversal(), Sampled([2, 1], "without_replacement"))]
)
def test_the_law_is_the_targets_where_drafts_rest_for_what_became_of_some(
    rule: AcceptanceRule, policy: GrowingPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[bool] = []
    make = checks.impressionable

    def shy(policy: GrowingPolicy, longest_habit: int) -> AdaptiveSpeculation:
        speculation = make(policy, longest_habit)
        speculation._payoff = Shy(rests)
        return speculation

    monkeypatch.setattr(checks, "impressionable", shy)
    assert adaptive_error(rule, policy) < TOLERANCE
    assert set(rests) == {True, False}


def test_the_choice_does_depend_on_the_past() -> None:
    """Without that the enumeration would say nothing about adaptivity."""
    chosen: dict[tuple[int, ...], None] = {}
    policy = chain(2, "iid")
    make = checks.impressionable

    def watched():
        speculation = make(policy)
        propose = speculation.propose
        trail: list[int] = []

        def watch(step, *rest):
            # At the last place nothing can be drafted.
            limit = step.drafting[0].max_draft_depth
            tree = propose(step, *rest)
            trail.append(int(tree.num_nodes_B[0]) - 1)
            chosen[(limit, *trail)] = None
            return tree

        speculation.propose = watch
        return speculation

    world = World.tree(2, 6).select("independent", "close")
    params = SamplingParams(temperature=1.0, max_new_tokens=4)
    engine_laws(world, Rejection(), policy, [((0,),)], params, speculation=watched, max_batch=1)
    # In the second round some draft (behind a hit) and some do not, though all could.
    second = {trail[-1] for limit, *trail in chosen if len(trail) == 2 and limit >= 1}
    assert second == {0, 1}, list(chosen)
