"""Train a Medusa or EAGLE head on data of `specdec data`; the best one is chosen by tau under the real verifier."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from specdec.attention import ATTENTION_NAME
from specdec.config import Medusa2HeadConfig, TrainConfig
from specdec.drafters.heads.formats import save_head
from specdec.drafters.heads.frequencies import save_frequencies
from specdec.drafters.training.cache import FeatureCache
from specdec.drafters.training.joint import MedusaJointObjective
from specdec.drafters.training.loop import Callbacks, Trainer
from specdec.drafters.training.records import RecordSet
from specdec.drafters.training.target import States, TrainingTarget
from specdec.experiments.building import build, sampling_params
from specdec.experiments.system import load_target, target_name
from specdec.experiments.tau import held_out_prompts, measure_tau
from specdec.experiments.train_report import training_picture, training_table
from specdec.experiments.train_setup import (
    build_objective,
    check,
    data_folders,
    learnt_counts,
    settings_of,
    training_params,
)
from specdec.model import PagedModel
from specdec.provenance import device_name, provenance
from specdec.tracking import Tracker


def run(config: TrainConfig, command: str) -> int:
    """Trains until the last step, or until tau has not risen for `training.patience` evaluations.

    In `folder` lie the latest checkpoint, from which the same command goes on, and the best head in `best`. Raises
    ValueError for what can be seen to be wrong before the target is loaded.
    """
    check(config)
    params, sampling, policy = training_params(config), sampling_params(config.sampling), build(config.policy)
    sampling = replace(sampling, seed=sampling.with_seed())
    folders = data_folders(config)
    train, held_out = RecordSet(folders, "train"), RecordSet(folders, "held_out")
    prompts = held_out_prompts(held_out, config.eval_prompts)
    Path(config.folder).mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision=config.training.mixed_precision, cpu=config.target.device == "cpu")
    tracker: Tracker | None = build(config.tracking) if accelerator.is_main_process else None
    try:
        if tracker is not None:
            tracker.start({**asdict(config), "provenance": provenance(command)})
        trainer, target = _prepare(config, params, train, accelerator)
        counts_V = learnt_counts(config.head, train, target.vocab_size)
        rows: list[dict[str, Any]] = []

        def evaluate(state: Mapping[str, Tensor]) -> dict[str, float]:
            head = _head_with(trainer, state)
            with _Serving(trainer, target):
                return measure_tau(head, target, policy, prompts, sampling, config.engine)

        def keep_best(state: Mapping[str, Tensor]) -> None:
            best = Path(config.folder) / "best"
            save_head(_head_with(trainer, state), best, base_model=target_name(config.target))
            save_frequencies(counts_V, best)
            if isinstance(trainer.objective, MedusaJointObjective):
                trainer.objective.model.save_pretrained(best / "target")
                if target.tokenizer is not None:
                    target.tokenizer.save_pretrained(best / "target")

        with _progress_bar(accelerator) as bar:
            task = bar.add_task(config.head.label, total=params.num_steps, completed=trainer.progress.step)

            def on_row(row: dict[str, Any]) -> None:
                assert tracker is not None
                rows.append(row)
                tracker.row(row)
                _show(bar, task, config.head.label, row)

            callbacks = Callbacks(
                on_row, evaluate if prompts else None, keep_best, lambda step: bar.update(task, completed=step)
            )
            progress = trainer.run(callbacks, held_out)
        if tracker is not None:
            score = {"tau" if prompts else "score": progress.best_score}
            ended = {"best_step": progress.best_step, **score, "steps": progress.step}
            tracker.row({"kind": "summary", **ended, "device": device_name(accelerator.device), **provenance(command)})
            tracker.summary(ended)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"a checkpoint is in {config.folder}; the same command goes on from there") from None
    finally:
        if tracker is not None:
            tracker.finish()
    if tracker is not None and rows:
        picture = tracker.path.with_suffix(".png")
        training_picture(tracker.path, picture)
        Console(markup=False, highlight=False).print(training_table(rows))
        print(
            f"best head in {Path(config.folder) / 'best'}, rows in {tracker.shown_path}, picture beside them",
            flush=True,
        )
    return 0


def _prepare(
    config: TrainConfig, params: Any, train: RecordSet, accelerator: Accelerator
) -> tuple[Trainer, PagedModel]:
    is_joint = isinstance(config.head, Medusa2HeadConfig)
    device = str(accelerator.device) if config.target.device == "auto" else config.target.device
    # The LM head's weights are wanted before they are packed, and rows of a whole batch are quickest in fast numerics.
    paged = load_target(replace(config.target, device=device, packed=False, numerics="fast"))
    if is_joint:
        # Weights that are trained are kept in float32, whatever products run in.
        paged.model.float()
    target = TrainingTarget(paged, pack=config.target.packed and not is_joint)
    objective = build_objective(config.head, target, train, params.seed, accelerator.print)
    states: States = target
    if config.cache is not None:
        states = _filled_cache(config, target, objective.layers, params.row_tokens, accelerator)
    if is_joint:
        paged.model.set_attn_implementation("sdpa")
    settings = settings_of(config, target_name(config.target))
    return Trainer(objective, states, train, params, Path(config.folder), settings, accelerator), paged


def _filled_cache(
    config: TrainConfig, target: TrainingTarget, layers: tuple[int, ...], row_tokens: int, accelerator: Accelerator
) -> FeatureCache:
    assert config.cache is not None
    everything = RecordSet(data_folders(config), "all")
    # The first process computes, the others find it done.
    with accelerator.main_process_first():
        name, dtype = target_name(config.target), target.model.dtype
        cache = FeatureCache(config.cache, everything, layers, target.hidden_size, dtype, name)
        if accelerator.is_main_process:
            size = f"{cache.bytes_per_token} bytes per token, {cache.num_bytes / 1e9:.2f} GB in all"
            with _progress_bar(accelerator) as bar:
                task = bar.add_task(f"features ({size})")
                cache.fill(target, row_tokens, lambda done, total: bar.update(task, completed=done, total=total))
    return cache


class _Serving:
    """While it lasts, a target that is being trained runs over pages."""

    def __init__(self, trainer: Trainer, target: PagedModel) -> None:
        self._trainer, self._target = trainer, target
        self._is_joint = isinstance(trainer.objective, MedusaJointObjective)

    def __enter__(self) -> None:
        self._trainer.objective.eval()
        if self._is_joint:
            self._target.model.set_attn_implementation(ATTENTION_NAME)

    def __exit__(self, *error: object) -> None:
        self._trainer.objective.train()
        if self._is_joint:
            self._target.model.set_attn_implementation("sdpa")


def _head_with(trainer: Trainer, state: Mapping[str, Tensor]) -> Any:
    """A copy of the head with these weights: serving may cast it."""
    head = copy.deepcopy(trainer.objective.head)
    prefix = "head."
    head.load_state_dict({name.removeprefix(prefix): one for name, one in state.items() if name.startswith(prefix)})
    return head.eval().requires_grad_(False)


def _progress_bar(accelerator: Accelerator) -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not (console.is_terminal and accelerator.is_main_process))


def _show(bar: Progress, task: TaskID, label: str, row: Mapping[str, Any]) -> None:
    if "tau" in row:
        bar.console.print(f"step {row['step']}: tau {row['tau']:.3f}", highlight=False)
    if "loss" in row:
        bar.update(task, description=f"{label}, loss {row['loss']:.3f}")


if __name__ == "__main__":
    from specdec.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
