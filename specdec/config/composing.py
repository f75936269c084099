"""From words on a command line to typed configs, and what a config may hold."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from specdec.config.measuring import PeerConfig
from specdec.config.schemas import register

CONFIGS = "specdec.configs"


def to_typed(config: DictConfig) -> Any:
    """The instance of its schema that a composed config describes.

    Raises ValueError for a key that was forced in with `+`, OmegaConf's MissingMandatoryValue for a value not given.
    """
    _refuse_unknown(config, "")
    return OmegaConf.to_object(config)


def peer_configs(peers: Any) -> dict[str, PeerConfig]:
    """The benchmark's peers by name. Raises OmegaConf's errors for what a `PeerConfig` does not hold."""
    found: dict[str, Any] = {}
    for name, peer in dict(peers).items():
        found[name] = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PeerConfig), peer))
    return found


def _refuse_unknown(config: DictConfig, prefix: str) -> None:
    schema = OmegaConf.get_type(config)
    known = {one.name for one in fields(schema)} if is_dataclass(schema) else set(config)
    for key in config:
        if key not in known:
            raise ValueError(f"unknown key {prefix}{key!s}: + adds nothing here; known are {', '.join(sorted(known))}")
        child = config._get_node(key)
        # A value that is an interpolation or None has no keys of its own.
        if isinstance(child, DictConfig) and isinstance(child._value(), dict):
            _refuse_unknown(child, f"{prefix}{key!s}.")


def options(group: str) -> list[str]:
    """The options of a config group; none where there is no such group."""
    folder = Path(str(files(CONFIGS) / group))
    return sorted(path.stem for path in folder.glob("*.yaml"))


def groups() -> dict[str, list[str]]:
    """Every config group and its options."""
    root = Path(str(files(CONFIGS)))
    names = sorted(path.relative_to(root).as_posix() for path in root.glob("**/") if path != root)
    return {name: found for name in names if (found := options(name))}


def compose(experiment: str, overrides: list[str]) -> DictConfig:
    """The config of an experiment, inside or outside a run of Hydra's. Raises Hydra's errors."""
    register()
    if GlobalHydra.instance().is_initialized():
        return hydra.compose(experiment, overrides)
    with hydra.initialize_config_module(CONFIGS, version_base="1.3"):
        return hydra.compose(experiment, overrides)


def keys(config: DictConfig, prefix: str = "") -> list[str]:
    """The dotted name of every value."""
    found = []
    for key, value in config.items_ex(resolve=False):
        if isinstance(value, DictConfig) and isinstance(value._value(), dict):
            found += keys(value, f"{prefix}{key!s}.")
        elif key != "_target_":
            found.append(f"{prefix}{key!s}")
    return found
