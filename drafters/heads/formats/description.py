"""A head as a checkpoint describes it, before any network is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from accelerate import init_empty_weights
from torch import Tensor

from specdec.drafters.heads.eagle import EagleConfig, EagleHead
from specdec.drafters.heads.formats.findings import Findings
from specdec.drafters.heads.medusa import MedusaConfig, MedusaHeads
from specdec.loading import ModelSizes
from specdec.model import PagedModel

HeadConfig = MedusaConfig | EagleConfig
Head = MedusaHeads | EagleHead
Target = PagedModel | ModelSizes


@dataclass(frozen=True)
class Options:
    """What a checkpoint may leave open or state wrongly: the target, and the meanings that overrule the implied ones."""

    target: Target | None = None
    layer_ids: str | None = None
    norm_before_residual: bool | None = None


@dataclass(frozen=True)
class Description:
    """What a checkpoint holds, in the names of the networks' own parameters.

    `config` is None where it contradicts itself; fields in `findings.unknown` hold placeholders.
    """

    format: str
    drafter: str
    config: HeadConfig | None
    tensors: Mapping[str, Tensor]
    findings: Findings
    base_model: str | None = None


def empty_head(config: HeadConfig) -> Head:
    """The network without memory for its parameters: their names and shapes, ready to take a checkpoint's tensors."""
    with init_empty_weights(include_buffers=False):
        return MedusaHeads(config) if isinstance(config, MedusaConfig) else EagleHead(config)


def check_target(config: HeadConfig, target: Target, findings: Findings) -> None:
    """Notes as problems that the head was made for a target of another width or vocabulary."""
    width = config.hidden_size if isinstance(config, MedusaConfig) else config.target_hidden_size
    if width != target.hidden_size:
        findings.problems.append(f"made for a target of hidden size {width}; this one has {target.hidden_size}")
    if "vocab_size" not in findings.unknown and config.vocab_size != target.vocab_size:
        findings.problems.append(f"made for a vocabulary of {config.vocab_size}; this target has {target.vocab_size}")
