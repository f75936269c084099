"""What reading a checkpoint finds out: problems, remarks, and what only the target can tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

_SHOWN = 6


@dataclass
class Findings:
    """Collects everything that is wrong instead of ending at the first mistake.

    A problem forbids to load; a note does not; `unknown` names fields of the head's config that the checkpoint leaves to
    the target.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def agree(self, what: str, told: Mapping[str, int | None]) -> int:
        """The value that every source in `told` gives; 1 with a problem where none does, the first where they differ."""
        given = {source: value for source, value in told.items() if value is not None}
        if not given:
            self.problems.append(f"nothing tells the {what}: no {', no '.join(told)}")
            return 1
        if len(set(given.values())) > 1:
            values = ", but ".join(f"{value} by {source}" for source, value in given.items())
            self.problems.append(f"{what}: {values}")
        return next(iter(given.values()))

    def integer(self, config: Mapping[str, Any], key: str) -> int | None:
        """An entry of config.json; None where there is none, with a problem where it is no whole number."""
        value = config.get(key)
        if value is not None and type(value) is not int:
            self.problems.append(f"{key}={value!r} in config.json is no whole number")
            return None
        return value

    def refuse(self, error: Exception) -> None:
        """Notes what config.json makes impossible to build."""
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        self.problems.append(f"config.json describes no head: {text}")

    def compare(
        self, expected: Mapping[str, Tensor], found: Mapping[str, Tensor], name_in_file: Callable[[str], str]
    ) -> None:
        """Names every tensor that is missing, unexpected or of another shape, by its name in the file.

        Shapes are compared only where nothing else is wrong: the sizes they should have would be guesses.
        """
        is_sure = not self.problems
        self._name("missing tensors", (name_in_file(name) for name in expected.keys() - found.keys()))
        self._name("unexpected tensors", (name_in_file(name) for name in found.keys() - expected.keys()))
        if not is_sure:
            return
        shapes = ((name, expected[name].shape, found[name].shape) for name in sorted(expected.keys() & found.keys()))
        self._name(
            "wrong shapes",
            (f"{name_in_file(name)} {[*is_]} instead of {[*should]}" for name, should, is_ in shapes if should != is_),
        )
        dtypes = (name for name in expected.keys() & found.keys() if _kind(expected[name]) != _kind(found[name]))
        self._name("wrong types", (f"{name_in_file(name)} {found[name].dtype}" for name in dtypes))

    def _name(self, what: str, items: Iterable[str]) -> None:
        listed = sorted(items)
        if listed:
            more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
            self.problems.append(f"{what}: {', '.join(listed[:_SHOWN])}{more}")


def _kind(tensor: Tensor) -> bool:
    return tensor.dtype.is_floating_point
