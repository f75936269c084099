"""A mutant: one wrong edit of a production function, and the check that has to find it."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any
from unittest.mock import patch

from specdec.certificates.check import Check, Finding, examine

# A mistake's effect is far above rounding; an error between the two would be a reason to look, not a catch.
CLEAR = 1e-6


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in the source of `function` ("module:name"), where it has to stand once; `by` is what finds it
    (None: the check's own measurement)."""

    name: str
    function: str
    old: str
    new: str
    check: Check
    by: str | None = None


@dataclass(frozen=True)
class Trial:
    """What became of a mutant: `caught` where the right code passes the check and the wrong code does not.

    `effect` is the size of the error; NaN where the check could not run.
    """

    name: str
    caught: bool
    by: str | None
    effect: float


def attempt(mutant: Mutant) -> Trial:
    """Runs the mutant's check with and without the edit."""
    with mutated(mutant):
        found = examine(mutant.check)
    # Another row's number is as good as one's own where nobody uses it twice: the law stays, the seed's promise does not.
    is_clear = found.by == "batch mates" or not found.error <= CLEAR
    caught = unmodified(mutant.check).by is None and found.by is not None and is_clear
    return Trial(mutant.name, caught, found.by, found.error)


@cache
def unmodified(check: Check) -> Finding:
    """What the check finds in the code as it is; many mutants share one check."""
    return examine(check)


@contextmanager
def mutated(mutant: Mutant) -> Iterator[None]:
    """Puts the edited function in the place of the real one.

    Raises ValueError where the text to edit is gone: the code has changed, and the mistake needs its new place.
    """
    module, _, path = mutant.function.partition(":")
    owner: Any = import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    count = source.count(mutant.old)
    if count != 1:
        raise ValueError(f"mutant {mutant.name!r}: {mutant.function} holds {mutant.old!r} {count} times, not once")
    edited = compile(
        "from __future__ import annotations\n" + source.replace(mutant.old, mutant.new), "<mutant>", "exec"
    )
    scope = dict(function.__globals__)
    exec(edited, scope)
    with patch.object(owner, name, scope[name]):
        yield
