"""Measures every contender on every batch of prompts, in turns, and remembers what is measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from specdec.experiments.contenders import Contender, Decoded
from specdec.experiments.peak_memory import peak_alone
from specdec.experiments.resume import Measurements, digest
from specdec.sampling import SamplingParams

_WARM_UP_PROMPT, _WARM_UP_TOKENS = 64, 16


@dataclass(frozen=True)
class Runs:
    """What one contender did at one batch size: per batch of prompts a run for each repetition."""

    contender: Contender
    batch_size: int
    batches: list[list[Decoded]] = field(default_factory=list)

    @property
    def all(self) -> list[Decoded]:
        return [run for batch in self.batches for run in batch]


@dataclass
class Session:
    """All prompts at each of `batch_sizes`, `num_repeats` times; `common` is what else a measurement depends on."""

    contenders: Seq[Contender]
    prompts: Seq[list[int]]
    params: SamplingParams
    batch_sizes: Seq[int]
    num_repeats: int
    raw: Measurements
    common: dict[str, Any]
    _warm: set[tuple[str, int]] = field(default_factory=set)

    def measure(self) -> list[Runs]:
        """By batch size, then in the order of the contenders; those that cannot have a batch size are left out there."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        found: list[Runs] = []
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            for size in self.batch_sizes:
                able = [one for one in self.contenders if one.max_batch_size is None or size <= one.max_batch_size]
                runs = {one.name: Runs(one, size) for one in able}
                batches = batches_of(self.prompts, size)
                task = progress.add_task("", total=len(able) * len(batches) * self.num_repeats)
                for number, batch in enumerate(batches):
                    for one in able:
                        runs[one.name].batches.append([])
                    for repeat in range(self.num_repeats):
                        # Nobody is always first, when the machine is cool, or always last.
                        start = (number * self.num_repeats + repeat) % len(able)
                        for one in able[start:] + able[:start]:
                            progress.update(task, description=f"{one.name}, batch {size}")
                            runs[one.name].batches[-1].append(self._run(one, batch, number, repeat))
                            progress.advance(task)
                found += runs.values()
        return found

    def peaks(self, builders: Mapping[str, Callable[[], Contender]]) -> dict[tuple[str, int], dict[str, int | None]]:
        """The peak memory of contenders alone, by name and batch size, on the first batch; see `peak_alone`."""
        found = {}
        for one in self.contenders:
            for size in self.batch_sizes:
                if one.name in builders and (one.max_batch_size is None or size <= one.max_batch_size):
                    batch = batches_of(self.prompts, size)[0]
                    key = digest("memory", one.name, one.labels, batch, self.common)
                    known = self.raw.get(key)
                    if known is None:
                        with Console(stderr=True).status(f"peak memory of {one.name}, batch {size}"):
                            peaks = peak_alone(builders[one.name], batch, self.params, torch.get_num_threads())
                        known = {"peaks": peaks}
                        self.raw.put(key, name=one.name, batch_size=size, **known)
                    found[one.name, size] = known["peaks"]
        return found

    def _run(self, one: Contender, batch: list[list[int]], number: int, repeat: int) -> Decoded:
        key = digest(one.name, one.labels, one.versions, batch, repeat, self.common)
        known = self.raw.get(key)
        if known is not None:
            return Decoded(**known["decoded"])
        if (one.name, len(batch)) not in self._warm:
            few = replace(self.params, max_new_tokens=min(_WARM_UP_TOKENS, self.params.max_new_tokens))
            one.decode([prompt[:_WARM_UP_PROMPT] for prompt in batch], few)
            self._warm.add((one.name, len(batch)))
        run = one.decode(batch, self.params)
        self.raw.put(key, name=one.name, prompt=number, repeat=repeat, batch_size=len(batch), decoded=asdict(run))
        return run


def batches_of(prompts: Seq[list[int]], size: int) -> list[list[list[int]]]:
    """All prompts in batches of one size; the last is filled up from the first prompt on."""
    again = itertools.cycle(prompts)
    return [list(itertools.islice(again, size)) for _ in range(-(-len(prompts) // size))]
