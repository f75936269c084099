"""From a config to what is trained: the head on its target, its objective, where its features come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from specdec.checkpoint import read_checkpoint
from specdec.config import (
    AccuraciesConfig,
    Eagle1HeadConfig,
    Eagle3HeadConfig,
    HeadConfig,
    Medusa2HeadConfig,
    MedusaHeadConfig,
    TrainConfig,
)
from specdec.drafters.heads import EagleHead
from specdec.drafters.heads.formats import Head, load_head
from specdec.drafters.heads.frequencies import FILE, read_frequencies
from specdec.drafters.training.initial import new_eagle, new_medusa, widened, with_vocabulary
from specdec.drafters.training.joint import MedusaJointObjective
from specdec.drafters.training.objectives import Eagle1Objective, Eagle3Objective, MedusaObjective, Objective
from specdec.drafters.training.params import TrainingParams
from specdec.drafters.training.records import RecordSet
from specdec.drafters.training.target import TrainingTarget
from specdec.drafters.training.vocabulary import coverage, most_frequent, token_counts

PRECISIONS = ("no", "bf16", "fp16")


def training_params(config: TrainConfig) -> TrainingParams:
    """Raises ValueError naming the value out of range."""
    values = asdict(config.training)
    if values.pop("mixed_precision") not in PRECISIONS:
        raise ValueError(f"training.mixed_precision={config.training.mixed_precision} must be {', '.join(PRECISIONS)}")
    return TrainingParams(**{**values, "betas": tuple(values["betas"])})


def build_objective(
    head: HeadConfig, target: TrainingTarget, data: RecordSet, seed: int, say: Callable[[str], object] = print
) -> Objective:
    """A new head, or the one of `head.initial`, and its objective; `say` tells what was chosen."""
    if isinstance(head, MedusaHeadConfig):
        heads = new_medusa(target, head.num_heads, head.num_layers, head.own_lm_head)
        _begin(heads, head.initial, target)
        if not isinstance(head, Medusa2HeadConfig):
            return MedusaObjective(heads, target, head.decay)
        return MedusaJointObjective(
            heads, target.model.model, head.decay, head.heads_weight, head.heads_rate, head.heads_warmup_steps
        )
    if isinstance(head, Eagle1HeadConfig):
        eagle = new_eagle(target, 1, seed, intermediate_size=head.intermediate_size)
        _begin(eagle, head.initial, target)
        return Eagle1Objective(eagle, target, head.token_weight, head.noise)
    assert isinstance(head, Eagle3HeadConfig)
    eagle = _eagle3(head, target, data, seed)
    if eagle.draft_to_target_R is not None:
        share = coverage(token_counts(data, target.vocab_size), eagle.draft_to_target_R.cpu())
        size = eagle.config.draft_vocab_size
        say(f"draft vocabulary: {size} of {target.vocab_size} tokens, {share:.2%} of the tokens to be learnt")
    return Eagle3Objective(eagle, target, head.num_steps, head.decay)


def learnt_counts(head: HeadConfig, data: RecordSet, vocab_size: int) -> Tensor:
    """How often each token [V] is to be learnt, and was by the head that training begins with, where that says so."""
    counts_V = token_counts(data, vocab_size)
    if head.initial is None:
        return counts_V
    file = read_checkpoint(head.initial).files[0].parent / FILE
    return counts_V + read_frequencies(file, vocab_size) if file.is_file() else counts_V


def _eagle3(head: Eagle3HeadConfig, target: TrainingTarget, data: RecordSet, seed: int) -> EagleHead:
    initial, size = head.initial, head.draft_vocab_size
    given = None if initial is None else load_head(initial, target.model, device=target.device)
    if initial is None and not head.keep_vocabulary:
        raise ValueError("head.keep_vocabulary=false is for a head that begins as another: give head.initial=PATH")
    ids = None
    if size is not None and size < target.vocab_size:
        known = given.draft_to_target_R if isinstance(given, EagleHead) else None
        counts_V = learnt_counts(head, data, target.vocab_size)
        ids = most_frequent(counts_V, size, None if known is None else known.cpu())
    eagle = new_eagle(target, 3, seed, ids, head.feature_layers, head.intermediate_size)
    if initial is not None and given is not None:
        if isinstance(given, EagleHead) and not head.keep_vocabulary:
            given = with_vocabulary(given, eagle)
        _take_over(eagle, given, initial)
    return eagle


def _begin(head: Head, initial: str | None, target: TrainingTarget) -> None:
    if initial is not None:
        _take_over(head, load_head(initial, target.model, device=target.device), initial)


def _take_over(head: Head, given: Head, initial: str) -> None:
    """Takes over weights and draft vocabulary of `given`, which may be narrower inside. Raises ValueError where it is of
    another shape than that."""
    if isinstance(head, EagleHead) and isinstance(given, EagleHead):
        given = widened(given, head)
    if given.config != head.config:
        raise ValueError(f"head.initial={initial} is {given.config}, and the head to be trained is {head.config}")
    head.load_state_dict(given.state_dict())


def settings_of(config: TrainConfig, target_name: str) -> dict[str, Any]:
    """What a training is, beside its data and `TrainingParams`."""
    evaluated = {
        "policy": {"name": config.policy.label, **asdict(config.policy)},
        "sampling": asdict(config.sampling),
        "eval_prompts": config.eval_prompts,
    }
    return {
        "target": target_name,
        "dtype": config.target.dtype,
        "head": {"kind": config.head.label, **asdict(config.head)},
        "mixed_precision": config.training.mixed_precision,
        **evaluated,
    }


def data_folders(config: TrainConfig | AccuraciesConfig) -> list[str]:
    """Raises ValueError where `data` names none."""
    folders = [config.data] if isinstance(config.data, str) else config.data
    if not isinstance(folders, list) or not folders or not all(isinstance(one, str) for one in folders):
        raise ValueError(f"data={config.data} must be a folder or a list of folders")
    return folders


def check(config: TrainConfig) -> None:
    """Raises ValueError for what can be seen to be wrong before the target is loaded."""
    if config.eval_prompts < 0:
        raise ValueError(f"eval_prompts={config.eval_prompts} must be >= 0")
    if isinstance(config.head, Medusa2HeadConfig) and config.cache is not None:
        raise ValueError("head=medusa2 trains the target, so its features change: leave out cache=")
    for folder in data_folders(config):
        if not Path(folder).is_dir():
            raise ValueError(f"data={folder}: no such folder; make training data with `specdec data folder={folder}`")
