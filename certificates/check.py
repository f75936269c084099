"""A check and what it finds: the error it measures, or the fault that kept it from measuring."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from specdec.certificates.oracle import BatchDependentError, KeyReusedError, NotALawError
from specdec.certificates.toy_model import WrongContextError

# What rounding may leave of an error that is none.
TOLERANCE = 1e-12


@dataclass(frozen=True)
class Check:
    """`error()` is 0 for right code; `error(share=True)` lets keys be reused, where the check knows keys at all.

    `joint_error` is that of the joint law of two rows alone in their batch, for code that mixes rows up.
    """

    name: str
    error: Callable[..., float]
    joint_error: Callable[[], float] = lambda: math.nan


@dataclass(frozen=True)
class Finding:
    """What is wrong: the check that measured it, or the fault that kept the check from running; None where nothing is.

    `error` is the size of it; NaN where a fault leaves nothing to measure.
    """

    by: str | None
    error: float


def examine(check: Check) -> Finding:
    """Runs a check; the oracle's refusals are findings too."""
    try:
        error = check.error()
    except KeyReusedError:
        return Finding("key reuse", check.error(share=True))
    except NotALawError:
        return Finding("not a law", math.nan)
    except BatchDependentError:
        return Finding("batch mates", check.joint_error())
    except WrongContextError:
        return Finding("wrong context", math.nan)
    except ValueError:
        return Finding("construction", math.nan)
    return Finding(None if error < TOLERANCE else check.name, error)
