"""Options of the engine that an experiment varies by itself."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from specdec.config import EngineConfig


def engine_with(config: EngineConfig, **values: Any) -> EngineConfig:
    """The config with other values. Raises ValueError for an option that the engine does not have."""
    known = [one.name for one in fields(config)]
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"engine.{name}={value}: this engine has no {name}; it knows {', '.join(known)}")
    return replace(config, **values)


def has_option(name: str) -> bool:
    return name in {one.name for one in fields(EngineConfig)}


def shares_prefixes(config: EngineConfig) -> bool:
    """Whether requests share the pages of equal beginnings."""
    return bool(getattr(config, "share_prefixes", False))
