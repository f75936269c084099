"""Learned heads from files and into them: which format it is, and the network of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from specdec.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from specdec.drafters.heads.formats import eagle, eagle_export, layers, medusa, native
from specdec.drafters.heads.formats.description import (
    Description,
    Head,
    HeadConfig,
    Options,
    Target,
    check_target,
    empty_head,
)

# Formats that can be written, and the heads that each can hold. `eagle` is that of EAGLE-1 and EAGLE-2.
FORMATS: dict[str, tuple[str, ...]] = {
    "medusa": ("medusa",),
    "eagle": ("eagle1",),
    "eagle3": ("eagle3",),
    "vllm": ("medusa", "eagle1", "eagle3"),
    "speculators": ("eagle3",),
    "specdec": ("medusa", "eagle1", "eagle3"),
}


def load_head(
    path: str | os.PathLike[str] | Checkpoint,
    target: Target | None = None,
    *,
    layer_ids: str | None = None,
    norm_before_residual: bool | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Head:
    """The head in a folder, file or hub id of any known format, or in a checkpoint that has been read.

    `target` (a PagedModel or its sizes) tells what the format leaves out, such as the number of layers, and must fit.
    `layer_ids` input or output and `norm_before_residual` overrule what the format implies, see `layers.CONVENTIONS`.
    `dtype` None keeps what is stored. Raises ValueError that names every missing, unexpected or misshapen tensor and
    every contradiction, FileNotFoundError where there is nothing.
    """
    checkpoint = path if isinstance(path, Checkpoint) else read_checkpoint(path)
    found = describe(checkpoint, Options(target, layer_ids, norm_before_residual))
    head = empty_head(_config_of(found, checkpoint.path))
    head.load_state_dict(dict(found.tensors), assign=True)
    return head.to(device=device, dtype=dtype)


def save_head(
    head: Head,
    path: str | os.PathLike[str],
    format: str = "specdec",
    *,
    base_model: str | None = None,
    target: Target | None = None,
) -> Path:
    """Writes a head in one of `FORMATS` into the folder `path`; returns the weight file. Tensors keep their types.

    `base_model` names the target in config.json; `target`, where given, is checked against what the format's readers can
    capture of it. Raises ValueError where the format cannot hold the head, or where its readers would compute
    something else.
    """
    return _write(head.config, head.state_dict(), path, format, base_model, target)


def export_head(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    format: str,
    target: Target | None = None,
    *,
    layer_ids: str | None = None,
    norm_before_residual: bool | None = None,
    base_model: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes the head at `path` once more, in another format, into the folder `output`; returns the weight file.

    As `load_head` and `save_head`, without the network in between. `base_model` None keeps the name that `path` gives, `dtype`
    None the numbers as stored.
    """
    found = describe(read_checkpoint(path), Options(target, layer_ids, norm_before_residual))
    _check_format(format, found.drafter)
    tensors = {name: one.to(dtype) if one.is_floating_point() else one for name, one in found.tensors.items()}
    return _write(_config_of(found, path), tensors, output, format, base_model or found.base_model, target)


def describe(checkpoint: Checkpoint, options: Options) -> Description:
    """What the checkpoint holds and what is wrong with it. Raises ValueError where it holds no head at all."""
    if options.layer_ids is not None and options.layer_ids not in layers.CONVENTIONS:
        raise ValueError(f"layer_ids={options.layer_ids!r} is unknown; use {' or '.join(layers.CONVENTIONS)}")
    if native.KEY in checkpoint.config:
        found = native.read(checkpoint)
    elif eagle.is_eagle(checkpoint.tensors):
        found = eagle.read(checkpoint, options)
    elif medusa.is_medusa(checkpoint.tensors):
        found = medusa.read(checkpoint, options)
    else:
        some = ", ".join(sorted(checkpoint.tensors)[:4])
        raise ValueError(f"{checkpoint.path} holds no Medusa or EAGLE head: its tensors are {some}, ...")
    if options.target is not None and found.config is not None:
        check_target(found.config, options.target, found.findings)
    return found


def _config_of(found: Description, path: str | os.PathLike[str]) -> HeadConfig:
    """The config of a head without faults, all of it known; raises ValueError where it is not."""
    if found.findings.problems:
        raise ValueError(f"{path}: {'; '.join(found.findings.problems)}")
    if found.findings.unknown:
        unknown = ", ".join(found.findings.unknown)
        raise ValueError(f"{path}: only the target tells its {unknown}; give the target (model= on the command line)")
    assert found.config is not None
    return found.config


def _check_format(format: str, drafter: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; use one of {', '.join(FORMATS)}")
    fitting = [name for name, drafters in FORMATS.items() if drafter in drafters]
    if fitting and format not in fitting:
        raise ValueError(f"format={format} holds no {drafter} head; use one of {', '.join(fitting)}")


def _write(
    config: HeadConfig,
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    format: str,
    base_model: str | None,
    target: Target | None,
) -> Path:
    _check_format(format, native.drafter_of(config))
    name = "model.safetensors"
    if format == native.KEY:
        written, settings = native.write(config, tensors, base_model)
    elif isinstance(config, medusa.MedusaConfig):
        written, settings, name = medusa.write(config, tensors, format, base_model)
    else:
        num_layers = None if target is None else target.num_layers
        written, settings = eagle_export.write(config, tensors, format, base_model, num_layers)
    return write_checkpoint(path, written, settings, name)
