"""Known-wrong variants of the production code: each must be caught, and the code as it is must pass the same check.

A mutant is one edit of a production function's source. If the text it edits is gone, the code has changed: find the new
place of the same mistake.
"""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch

from specdec import SamplingParams
from specdec.certificates.checks import (
    PARAMETERS,
    adaptive_error,
    generation_error,
    parameters_error,
    recorded_error,
    union_mismatch,
)
from specdec.certificates.oracle import (
    BatchDependentError,
    KeyReusedError,
    NotALawError,
    Scripts,
    TokenSpan,
    distance,
    enumerate_outcomes,
    law_of,
    product_law,
)
from specdec.certificates.processes import Case, engine_laws, one_round, ragged_cases, round_error
from specdec.certificates.worlds import KINDS, World, WrongContextError
from specdec.drafters.growth import GrowingPolicy
from specdec.interfaces import AcceptanceRule
from specdec.noise import CounterNoise


@dataclass(frozen=True)
class Check:
    """Something that is 0 for right code, and what a larger value means; `error(share=True)` lets keys be reused.

    `joint_error` is that of the joint law of two rows alone in their batch.
    """

    by: str
    error: Callable[..., float]
    joint_error: Callable[[], float] = lambda: math.nan


def in_one_round(rule: AcceptanceRule, policy: GrowingPolicy, kinds: Seq[str] = KINDS) -> Check:
    """Error of the joint law over a round of all these kinds of laws."""
    world = World.tree(3, policy.max_depth + 2).select(*kinds)
    cases = ragged_cases(world, policy.max_depth)
    length = policy.max_depth + 1

    def joint_error() -> float:
        coins = World.tree(2, policy.max_depth + 3).select("independent", "close")
        rows = Case(0, 0, policy.max_depth), Case(1, 1, policy.max_depth)

        def run(pairs: list[tuple[Case, Case]], scripts: Scripts) -> list[tuple[TokenSpan, ...]]:
            return [tuple(one_round(policy, rule, coins, pairs[0], scripts.noise())[1])]

        (outcomes,) = enumerate_outcomes(run, [rows], rows_per_case=2, max_batch=1)
        law: dict[tuple[TokenSpan, TokenSpan], float] = {}
        for prob, pair in outcomes:
            ends = (coins.continued(row.kind, row.state, span, length) for row, span in zip(rows, pair, strict=True))
            for both, q in product_law(*ends).items():
                law[both] = law.get(both, 0.0) + prob * q
        return distance(law, product_law(*(coins.continued(row.kind, row.state, (), length) for row in rows)))

    return Check("law", partial(round_error, policy, rule, world, cases, length), joint_error)


def in_generations(rule: AcceptanceRule, policy: GrowingPolicy, length: int) -> Check:
    """Error of the law of whole outputs of the engine."""
    world = World.tree(3, length + 4).select("sharp", "independent", "zeros")

    def joint_error() -> float:
        coins = World.tree(2, length + 4).select("independent", "close")
        params = SamplingParams(temperature=1.0, max_new_tokens=2)
        (law,) = engine_laws(coins, rule, policy, [((0,), (1,))], params, max_batch=1)
        spans = law_of((prob, (one, other)) for ((one, _), (other, _)), prob in law.items())
        return distance(spans, product_law(coins.stopped_law(0, 0, 2), coins.stopped_law(1, 0, 2)))

    return Check("law", partial(generation_error, world, rule, policy, length), joint_error)


def adaptively(rule: AcceptanceRule, policy: GrowingPolicy) -> Check:
    """Error of the law of whole outputs where the past decides how deep each step drafts."""
    return Check("law", partial(adaptive_error, rule, policy))


def in_parameters(rule: AcceptanceRule, policy: GrowingPolicy, *params: SamplingParams) -> Check:
    """Error of the law of whole outputs under sampling parameters: the given ones, or all there are."""
    return Check("law", partial(parameters_error, rule, policy, params or PARAMETERS))


def in_recorded_laws(policy: GrowingPolicy) -> Check:
    """Error of the probability of drawn trees as their draws and laws tell it."""
    world = World.tree(3, policy.max_depth + 1)
    return Check("recorded law", partial(recorded_error, policy, world))


def in_unions(rule: AcceptanceRule, policy: GrowingPolicy) -> Check:
    """Share of the trees joined from several drafters' that these did not draft so, or drafted behind another text."""
    return Check("other paths", partial(union_mismatch, rule, policy))


def at_the_edges_of_chance(rule: AcceptanceRule, policy: GrowingPolicy) -> Check:
    """Share of rows that emit an impossible token when every random number is the smallest or the largest there is."""
    world = World.tree(3, policy.max_depth + 2)
    rows = [case for case in ragged_cases(world, policy.max_depth) if case.limit]

    def error() -> float:
        impossible = 0
        for u in (0.0, 1 - 2.0**-53):
            noise = CounterNoise([0] * len(rows), [0] * len(rows), [0] * len(rows))
            with patch.object(CounterNoise, "uniform", lambda self, key, at, u=u: torch.full((len(at),), u).double()):
                _, emitted = one_round(policy, rule, world, rows, noise)
            for row, span in zip(rows, emitted, strict=True):
                states = [world.walk(span[:i], row.state) for i in range(len(span))]
                impossible += any(world.target_KCV[row.kind, s, t] == 0 for s, t in zip(states, span, strict=True))
        return impossible / (2 * len(rows))

    return Check("impossible token", error)


@dataclass(frozen=True)
class Mutant:
    """One wrong edit: `old` becomes `new` in the source of `function`; `by` is what
    catches it (None: what the check measures)."""

    name: str
    function: str
    old: str
    new: str
    check: Check
    by: str | None = None


@contextmanager
def mutated(mutant: Mutant) -> Iterator[None]:
    """Puts the edited function in the place of the real one."""
    module, _, path = mutant.function.partition(":")
    owner: Any = import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    count = source.count(mutant.old)
    assert count == 1, f"{mutant.function} holds {mutant.old!r} {count} times, not once: find the mistake's new place"
    scope = dict(inspect.unwrap(function).__globals__)
    exec(
        compile("from __future__ import annotations\n" + source.replace(mutant.old, mutant.new), "<mutant>", "exec"),
        scope,
    )
    with patch.object(owner, name, scope[name]):
        yield


def verdict(check: Check) -> tuple[str, float]:
    """What finds a fault, if anything does, and its size: the error of what the check measures, NaN where it cannot run."""
    try:
        error = check.error()
    except KeyReusedError:
        return "key reuse", check.error(share=True)
    except NotALawError:
        return "not a law", math.nan
    except BatchDependentError:
        return "batch mates", check.joint_error()
    except WrongContextError:
        return "wrong context", math.nan
    except ValueError:
        return "construction", math.nan
    return (check.by if error > 1e-6 else "nothing"), error
