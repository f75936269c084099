"""From a typed config to the library's arguments and objects."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from specdec.config import SamplingConfig
from specdec.sampling import SamplingParams


def sampling_params(config: SamplingConfig) -> SamplingParams:
    """Raises ValueError naming the value out of range."""
    try:
        bias = {int(token): float(value) for token, value in dict(config.logit_bias or {}).items()}
    except (TypeError, ValueError):
        raise ValueError(f"logit_bias={config.logit_bias!r} must be {{token id: number, ...}}") from None
    values = {**asdict(config), "logit_bias": bias}
    return SamplingParams(**{**values, "stop": tuple(config.stop), "stop_token_ids": tuple(config.stop_token_ids)})


def build(config: Any) -> Any:
    """The object that a `_target_` node names, from the node's other values; a drafter's policy is built on its own.

    Raises what the object's own constructor raises.
    """
    try:
        return instantiate(_without_policies(asdict(config)), _convert_="all")
    except InstantiationException as error:
        raise error.__cause__ or error from None


def _without_policies(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_policies(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key != "policy"
    }


def describe(config: Any) -> str:
    """A policy or drafter in a word and its values, as result rows name it: `top_k(total=16, depth=5, k=4)`."""
    skipped = ("_target_", "policy", "path", "gguf_file", "dtype", "device")
    values = {key: value for key, value in asdict(config).items() if key not in skipped}
    if isinstance(values.get("choices"), str):
        # Of a file the name alone: rows hold no local paths.
        values["choices"] = Path(values["choices"]).name
    return f"{config.label}({', '.join(f'{key}={value}' for key, value in values.items())})" if values else config.label
