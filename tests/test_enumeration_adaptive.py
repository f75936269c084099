"""The law of adaptive speculation, by enumeration: exact, although what is drafted depends on what became of drafts before."""

from __future__ import annotations

import pytest

from specdec import SamplingParams
from specdec.certificates import checks
from specdec.certificates.checks import TOLERANCE, adaptive_error
from specdec.certificates.processes import engine_laws
from specdec.certificates.worlds import World
from specdec.drafters import Mixed, Sampled, TopK, chain
from specdec.drafters.growth import GrowingPolicy
from specdec.interfaces import AcceptanceRule
from specdec.verifiers import Block, Follow, Rejection, Traversal


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
def test_the_law_is_the_targets(rule: AcceptanceRule, policy: GrowingPolicy) -> None:
    assert adaptive_error(rule, policy) < TOLERANCE


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
