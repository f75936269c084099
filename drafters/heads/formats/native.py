"""Our own format: tensors under their published names, and the head's config as it is in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from specdec.checkpoint import Checkpoint
from specdec.drafters.heads.eagle import EagleConfig
from specdec.drafters.heads.formats import vocabulary
from specdec.drafters.heads.formats.description import Description, HeadConfig, empty_head
from specdec.drafters.heads.formats.eagle import IDS
from specdec.drafters.heads.formats.eagle_export import published_tensors
from specdec.drafters.heads.formats.findings import Findings
from specdec.drafters.heads.medusa import MedusaConfig

KEY = "specdec"
# Raised when a reader of this version would misunderstand what is written.
_VERSION = 1


def drafter_of(config: HeadConfig) -> str:
    return "medusa" if isinstance(config, MedusaConfig) else f"eagle{config.version}"


def read(checkpoint: Checkpoint) -> Description:
    """The head of a checkpoint whose config.json holds `specdec`; layer ids are transformers' indices of hidden states."""
    findings, held = Findings(), checkpoint.config[KEY]
    tensors = dict(checkpoint.tensors)
    if not isinstance(held, Mapping) or held.get("version") != _VERSION:
        version = held.get("version") if isinstance(held, Mapping) else held
        findings.problems.append(
            f"specdec.version={version!r} in config.json is unknown; this release reads {_VERSION}"
        )
        return Description(KEY, "unknown", None, tensors, findings)
    drafter, base_model = str(held.get("drafter")), held.get("base_model")
    config: HeadConfig
    try:
        config = MedusaConfig(**held["config"]) if drafter == "medusa" else EagleConfig(**held["config"])
        if drafter_of(config) != drafter:
            raise ValueError(f"specdec.drafter={drafter!r}, but its config is of {drafter_of(config)}")
        expected = empty_head(config).state_dict()
    except (TypeError, KeyError, ValueError) as error:
        findings.refuse(error)
        return Description(KEY, drafter, None, tensors, findings, base_model)
    d2t, t2d = tensors.pop("d2t", None), tensors.pop("t2d", None)
    if d2t is not None:
        ids = vocabulary.to_target_ids(d2t, t2d, config.vocab_size, findings)
        tensors |= {IDS: ids} if isinstance(config, EagleConfig) and config.is_reduced else {}
    findings.compare(expected, tensors, lambda name: "d2t" if name == IDS else name)
    return Description(KEY, drafter, config, tensors, findings, base_model)


def write(
    config: HeadConfig, tensors: Mapping[str, Tensor], base_model: str | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    published = published_tensors(config, tensors) if isinstance(config, EagleConfig) else dict(tensors)
    held = {"version": _VERSION, "drafter": drafter_of(config), "base_model": base_model, "config": asdict(config)}
    return published, {KEY: held}
