"""The training loop: steps over packed rows under accelerate, validated, saved, resumed and stopped early."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from specdec.drafters.training.interrupts import interrupted_after
from specdec.drafters.training.objectives import Objective
from specdec.drafters.training.optimizers import make_optimizers
from specdec.drafters.training.params import TrainingParams
from specdec.drafters.training.records import RecordSet, write_json
from specdec.drafters.training.rows import Row, RowSchedule, plan_rows
from specdec.drafters.training.sources import seed_of
from specdec.drafters.training.target import States
from specdec.drafters.training.totals import Totals

_PREFIX, _PROGRESS = "step-", "progress.json"
# They say when to look, not what is trained.
_FREE = ("log_every", "save_every")


@dataclass
class Progress:
    """How far a training is: steps taken, the step evaluated last, the best score (tau, or else minus the held-out loss)."""

    step: int = 0
    evaluated_step: int = 0
    best_score: float | None = None
    best_step: int = 0
    evals_without_gain: int = 0
    stopped_early: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


# Weights of the objective by name.
StateDict = Mapping[str, Tensor]


@dataclass(frozen=True)
class Callbacks:
    """What a training tells, on the main process alone.

    `on_row` takes rows of numbers: means since the last one, and evaluations. `evaluate` measures the weights; the number
    under `tau` decides what is best. `on_best` takes the weights of a better evaluation, `on_step` the steps taken.
    """

    on_row: Callable[[dict[str, Any]], None] = lambda row: None
    evaluate: Callable[[StateDict], Mapping[str, float]] | None = None
    on_best: Callable[[StateDict], None] = lambda state: None
    on_step: Callable[[int], None] = lambda step: None


class Trainer:
    """Trains an objective on the records of `data` and keeps checkpoints in `folder`.

    `states` gives the target's hidden states of a row. A step's rows, noise and learning rate follow from its number, so a
    training that was stopped goes on exactly as if it had not been. `settings` say what is trained; a folder with a
    checkpoint of other settings is refused with ValueError.
    """

    def __init__(
        self,
        objective: Objective,
        states: States,
        data: RecordSet,
        params: TrainingParams,
        folder: str | Path,
        settings: Mapping[str, Any],
        accelerator: Accelerator,
    ) -> None:
        if params.rows_per_step % accelerator.num_processes:
            raise ValueError(
                f"rows_per_step={params.rows_per_step} is not a multiple of the {accelerator.num_processes} processes"
            )
        self.objective, self.params, self.folder, self.accelerator = objective, params, Path(folder), accelerator
        self._states, self._data = states, data
        self._schedule = RowSchedule(data.lengths, params.row_tokens, params.rows_per_step, params.seed)
        optimizers = make_optimizers(objective, params)
        self._peaks = [[group["lr"] for group in one.param_groups] for one in optimizers]
        self.module, *self._optimizers = accelerator.prepare(objective, *optimizers)
        fixed = {key: value for key, value in asdict(params).items() if key not in _FREE}
        self.progress = Progress(settings=json.loads(json.dumps({**settings, "data": data.fingerprint, **fixed})))
        if accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
        accelerator.wait_for_everyone()
        self._resume()

    def run(self, callbacks: Callbacks | None = None, held_out: RecordSet | None = None) -> Progress:
        """Trains to the end or to the early stop, looking at `held_out` at each evaluation. Ctrl-C saves a checkpoint in a
        training of one process."""
        params, progress, calls = self.params, self.progress, callbacks or Callbacks()
        totals = Totals()
        try:
            # An evaluation that was stopped is made up for.
            if self._evaluate_if_due(calls, held_out):
                self.save()
            while not self.is_done:
                with interrupted_after():
                    self._train_step(progress.step, totals)
                    progress.step += 1
                if self._is_due(params.log_every):
                    rate = self._optimizers[0].param_groups[0]["lr"]
                    self._emit(calls, {"kind": "train", "learning_rate": rate, **totals.means(self.accelerator)})
                    totals = Totals()
                self._evaluate_if_due(calls, held_out)
                if self.is_done or self._is_due(params.save_every):
                    self.save()
                calls.on_step(progress.step)
        except KeyboardInterrupt:
            # Several processes may have been interrupted in different steps; their last common checkpoint stands.
            if self.accelerator.num_processes == 1:
                self.save()
            raise
        return progress

    @property
    def is_done(self) -> bool:
        return self.progress.stopped_early or self.progress.step == self.params.num_steps

    def _is_due(self, every: int) -> bool:
        step = self.progress.step
        return step > 0 and (step == self.params.num_steps or (every > 0 and step % every == 0))

    def save(self) -> None:
        """A checkpoint of this step; the ones before are removed once it is complete."""
        place, part = self.folder / f"{_PREFIX}{self.progress.step}", self.folder / "part"
        self._on_main(lambda: shutil.rmtree(part, ignore_errors=True))
        self.accelerator.save_state(str(part))
        self.accelerator.wait_for_everyone()
        self._on_main(lambda: self._complete(part, place))

    def validate(self, data: RecordSet) -> dict[str, float]:
        """Losses and accuracies on all records of `data`, the processes sharing them."""
        totals = Totals()
        rows = plan_rows(data.lengths, self.params.row_tokens, 0, 0)
        # A process without a row would have nothing to add up; losses of rows run twice are sums in both parts.
        share = rows[self.accelerator.process_index :: self.accelerator.num_processes] or rows[:1]
        self.module.eval()
        with torch.no_grad():
            for records in share:
                row = Row.of([data[i] for i in records], self.accelerator.device)
                totals.add(self.module(row, self._states_of(data, records, row), 0))
        self.module.train()
        return totals.means(self.accelerator)

    def _train_step(self, step: int, totals: Totals) -> None:
        accelerator, objective = self.accelerator, self.objective
        objective.at_step(step)
        self.module.train()
        for optimizer, peaks in zip(self._optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * self.params.rate(step)
        plan = self._schedule.step(step)
        rows = [Row.of([self._data[i] for i in records], accelerator.device) for records in plan]
        # Every process counts every row, so the mean over all tokens of the step needs no communication.
        num_targets = max(sum(objective.num_targets(row) for row in rows), 1)
        mine = range(accelerator.process_index, len(rows), accelerator.num_processes)
        for number in mine:
            states = self._states_of(self._data, plan[number], rows[number])
            with nullcontext() if number == mine[-1] else accelerator.no_sync(self.module):
                out = self.module(rows[number], states, seed_of("noise", self.params.seed, step, number))
                # Gradients of the processes are averaged, and their sum is wanted.
                accelerator.backward(out["loss"] * (accelerator.num_processes / num_targets))
            totals.add(out)
        totals.add_grad_norm(float(accelerator.clip_grad_norm_(self.module.parameters(), self.params.max_grad_norm)))
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def _states_of(self, data: RecordSet, records: list[int], row: Row) -> dict[int, Tensor]:
        layers = self.objective.layers
        return self._states([data.index_in_folder(i) for i in records], row, layers) if layers else {}

    def _evaluate_if_due(self, calls: Callbacks, held_out: RecordSet | None) -> bool:
        progress = self.progress
        if not self._is_due(self.params.eval_every) or progress.evaluated_step == progress.step:
            return False
        row: dict[str, Any] = {"kind": "eval"}
        if held_out is not None and len(held_out):
            row |= self.validate(held_out)
        # Gathered by all processes together, where weights are sharded.
        state = self.accelerator.get_state_dict(self.module)
        if calls.evaluate is not None and self.accelerator.is_main_process:
            row |= calls.evaluate(state)
        # Where nothing is measured, the latest weights are the best.
        scores = [row.get("tau", -row["loss"] if "loss" in row else float(progress.step))]
        broadcast_object_list(scores)
        if progress.best_score is None or scores[0] > progress.best_score:
            progress.best_score, progress.best_step, progress.evals_without_gain = scores[0], progress.step, 0
            self._on_main(lambda: calls.on_best(state))
        else:
            progress.evals_without_gain += 1
        progress.evaluated_step = progress.step
        progress.stopped_early = 0 < self.params.patience <= progress.evals_without_gain
        num_tokens = self._schedule.num_tokens(progress.step)
        self._emit(calls, {**row, "num_tokens": num_tokens, "is_best": progress.best_step == progress.step})
        return True

    def _emit(self, calls: Callbacks, row: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            epoch = self._schedule.epoch_of(self.progress.step - 1)
            calls.on_row({"step": self.progress.step, "epoch": epoch, **row})

    def _on_main(self, action: Callable[[], object]) -> None:
        if self.accelerator.is_main_process:
            action()
        self.accelerator.wait_for_everyone()

    def _complete(self, part: Path, place: Path) -> None:
        write_json(part / _PROGRESS, asdict(self.progress))
        shutil.rmtree(place, ignore_errors=True)
        part.rename(place)
        for old in checkpoints(self.folder):
            if old != place:
                shutil.rmtree(old)

    def _resume(self) -> None:
        found = checkpoints(self.folder)
        if not found:
            return
        old = Progress(**json.loads((found[-1] / _PROGRESS).read_text(encoding="utf-8")))
        new = self.progress.settings
        for name in {**old.settings, **new}:
            if old.settings.get(name) != new.get(name):
                raise ValueError(
                    f"{self.folder} holds a training with {name}={old.settings.get(name)!r}, not {new.get(name)!r}: "
                    f"choose another folder="
                )
        self.accelerator.load_state(str(found[-1]))
        self.progress = old


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, the latest last."""
    found = [one for one in folder.glob(f"{_PREFIX}*") if (one / _PROGRESS).is_file()]
    return sorted(found, key=lambda one: int(one.name.removeprefix(_PREFIX)))
