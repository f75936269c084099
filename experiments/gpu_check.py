"""Check every kernel, text and rounding on the device at hand, and if all is well measure what it gives."""

from __future__ import annotations

import sys
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from specdec.config import GpuCheckConfig, StandInConfig, TargetConfig
from specdec.experiments.contenders import PLAIN, system_config
from specdec.experiments.gpu_aims import MISSED, PASSED, aims_of
from specdec.experiments.gpu_kernels import check_kernels
from specdec.experiments.gpu_measures import attention_bandwidth, busy_share, copy_bandwidth, forward_seconds
from specdec.experiments.gpu_texts import Texts
from specdec.experiments.kernel_check import SMALL, Check, Sizes
from specdec.experiments.measurement import Measurement, decode, warm_up
from specdec.experiments.prompts import check_chat
from specdec.experiments.system import System, load_system, load_target, plain_system, target_labels
from specdec.loading import place_of
from specdec.model import PagedModel
from specdec.provenance import device_name, provenance
from specdec.request import Result
from specdec.sampling import SamplingParams
from specdec.stand_in import ModelShape
from specdec.tracking import JsonlTracker

CHECKS, MEASURES = ("kernels", "text", "rounding"), ("bandwidth", "forward", "decode")
RESULTS = "experiments/results/gpu.jsonl"


def run(config: GpuCheckConfig, command: str) -> int:
    """Runs `parts`, checks before measures; the latter only where no check failed. Returns 1 where one did; a missed aim is
    told in its row and fails nothing.

    Rows go to `output`; None is the repository's results on CUDA and nowhere else, for times on a CPU say nothing of a GPU.
    """
    if unknown := [one for one in config.parts if one not in CHECKS + MEASURES]:
        raise ValueError(f"parts={unknown} are unknown: choose of {', '.join(CHECKS + MEASURES)}")
    check_chat(config.chat)
    session = GpuCheck(config, command)
    try:
        return session.run()
    finally:
        session.finish()


class GpuCheck:
    """One run: what was checked, and the rows of what was measured, which are written as they come."""

    def __init__(self, config: GpuCheckConfig, command: str) -> None:
        self.config, self.device = config, place_of(config.target.device)
        self.checks: list[Check] = []
        self.rows: list[dict[str, Any]] = []
        self._texts = Texts(config, self.device)
        output = config.output if config.output is not None else RESULTS if self.device.type == "cuda" else None
        self._tracker = None if output is None else JsonlTracker(output)
        self._common = {
            "experiment": "gpu_check",
            "device": device_name(self.device),
            "is_gpu": self.device.type == "cuda",
            **provenance(command),
        }
        self._console = Console(markup=False, highlight=False)

    def run(self) -> int:
        parts = self.config.parts
        for name in (part for part in CHECKS if part in parts):
            getattr(self, f"check_{name}")()
        failed = any(one.passed is False for one in self.checks)
        self._console.print(self._check_table())
        if failed:
            print("a check failed: nothing is measured, for the time of a wrong result says nothing", file=sys.stderr)
            return 1
        for name in (part for part in MEASURES if part in parts):
            getattr(self, f"measure_{name}")()
        if self.rows:
            self._console.print(self._row_table())
            outcomes = [outcome for row in self.rows for outcome in row["aims"].values()]
            if outcomes:
                print(f"of {len(outcomes)} aims {outcomes.count(PASSED)} passed, {outcomes.count(MISSED)} missed")
        if self.device.type != "cuda":
            print("these times are a CPU's: they say nothing of a GPU")
        if self._tracker is not None:
            print(f"{len(self.rows)} rows in {self._tracker.shown_path}")
        return 0

    def finish(self) -> None:
        if self._tracker is not None:
            self._tracker.finish()

    def check_kernels(self) -> None:
        self.checks += check_kernels(self.device, SMALL if self.config.small else Sizes())

    def check_text(self) -> None:
        self.checks += self._texts.check()

    def check_rounding(self) -> None:
        self.checks += self._texts.check_rounding()

    def measure_bandwidth(self) -> None:
        shape, repeats = ModelShape(**asdict(self.config.shape)), self.config.repeats
        copied = copy_bandwidth(self.device, self.config.copy_mib << 20, repeats)
        self._row(measure="copy", mib=self.config.copy_mib, bytes_per_s=copied)
        for batch in self.config.batch_sizes:
            for context in self.config.contexts:
                for nodes in (1, self.config.num_nodes):
                    found = attention_bandwidth(shape, batch, nodes, context, torch.bfloat16, self.device, repeats)
                    self._row(
                        measure="attention",
                        shape=asdict(shape),
                        dtype="bfloat16",
                        batch_size=batch,
                        context=context,
                        num_nodes=nodes,
                        bytes_per_s=found,
                        share_of_copy=found / copied,
                    )

    def measure_forward(self) -> None:
        """What a tree costs beside a single token, at the large shape."""
        settings = self._stand_in()
        target, nodes = load_target(settings), self.config.num_nodes
        limit = (target.max_positions or 1 << 30) - nodes
        for batch in self.config.batch_sizes:
            for context in [one for one in self.config.contexts if one <= limit]:
                for graphs in (True, False) if self.device.type == "cuda" else (False,):
                    plain, tree = forward_seconds(target, batch, (1, nodes), context, self.config.repeats, graphs)
                    self._row(
                        measure="forward",
                        **self._labels(settings, target),
                        batch_size=batch,
                        context=context,
                        num_nodes=nodes,
                        cuda_graphs=graphs,
                        plain_s=plain,
                        verify_s=tree,
                        verify_ratio=tree / plain,
                    )

    def measure_decode(self) -> None:
        """Tokens per second of whole engines, the small target and the stand-in, against plain decoding of the same process."""
        for settings in (replace(self.config.target, dtype="bfloat16"), self._stand_in()):
            target = load_target(settings)
            params = SamplingParams(max_new_tokens=self.config.max_new_tokens, ignore_eos=True, seed=0)
            for batch in self.config.batch_sizes:
                systems = {PLAIN: plain_system()}
                for name in self.config.systems:
                    systems[name] = load_system(system_config(name, settings, self.config.draft))
                prompts = self._texts.prompts(target)
                prompts = [prompts[i % len(prompts)] for i in range(max(batch, len(prompts)))]
                for graphs in (True, False) if self.device.type == "cuda" else (True,):
                    plain: tuple[Measurement, list[Result]] | None = None
                    for name, system in systems.items():
                        plain = self._decode(name, system, settings, target, prompts, params, batch, graphs, plain)

    def _decode(
        self,
        name: str,
        system: System,
        settings: TargetConfig,
        target: PagedModel,
        prompts: list[list[int]],
        params: SamplingParams,
        batch: int,
        graphs: bool,
        plain: tuple[Measurement, list[Result]] | None,
    ) -> tuple[Measurement, list[Result]]:
        """One row; returns plain decoding's measurement."""
        engine = system.engine(target, self._texts.engine(target, batch, graphs))
        each = [params] * len(prompts)
        warm_up(engine, prompts[0], False)
        # Once over everything, so that no graph is recorded while it is measured.
        decode(engine, prompts, each, False, Measurement())
        cost = Measurement()
        results = decode(engine, prompts, each, False, cost)
        busy = busy_share(lambda: engine.generate(prompts, params), self.device)
        plain = plain or (cost, results)
        same = sum(a.token_ids == b.token_ids for a, b in zip(results, plain[1], strict=True))
        speedup = cost.tokens_per_s / plain[0].tokens_per_s
        self._row(
            measure="decode",
            name=name,
            system="specdec",
            **system.labels,
            **self._labels(settings, target),
            prompts=self.config.prompts or "built in",
            temperature=params.temperature,
            batch_size=batch,
            cuda_graphs=graphs,
            tau=cost.tau,
            tokens_per_s=cost.tokens_per_s,
            plain_tokens_per_s=plain[0].tokens_per_s,
            speedup=speedup,
            efficiency=speedup / cost.tau,
            same_text_as_plain=same / len(results),
            host_share=None if busy is None else 1 - busy,
            **{f"{phase}_share": share for phase, share in cost.shares.items()},
        )
        return plain

    def _stand_in(self) -> StandInConfig:
        values = {one.name: getattr(self.config.target, one.name) for one in fields(TargetConfig)}
        return StandInConfig(**{**values, "dtype": "bfloat16"}, shape=self.config.shape)

    def _labels(self, settings: TargetConfig, target: PagedModel) -> dict[str, Any]:
        return {**target_labels(settings), "dtype": str(target.dtype).removeprefix("torch.")}

    def _row(self, **fields: Any) -> None:
        row = {**fields, **self._common}
        row["aims"] = aims_of(row)
        self.rows.append(row)
        if self._tracker is not None:
            self._tracker.row(row)

    def _check_table(self) -> Table:
        table = Table("check", "", "detail", title=f"checks on {self._common['device']}", title_justify="left")
        for one in self.checks:
            table.add_row(one.name, {True: "passed", False: "FAILED", None: "-"}[one.passed], one.detail)
        return table

    def _row_table(self) -> Table:
        table = Table(
            "measure", "what", "found", "aim", title=f"measured on {self._common['device']}", title_justify="left"
        )
        for row in self.rows:
            aims = ", ".join(f"{aim}: {outcome}" for aim, outcome in row["aims"].items())
            table.add_row(row["measure"], *_told(row), aims)
        return table


def _told(row: dict[str, Any]) -> tuple[str, str]:
    """What was measured, and what was found, in words."""
    if row["measure"] == "copy":
        return f"{row['mib']} MiB", f"{row['bytes_per_s'] / 1e9:.0f} GB/s"
    where = f"batch {row['batch_size']}"
    if row["measure"] == "attention":
        found = f"{row['bytes_per_s'] / 1e9:.0f} GB/s, {row['share_of_copy']:.0%} of a copy"
        return f"{where}, context {row['context']}, {row['num_nodes']} nodes", found
    graphs = "graphs" if row["cuda_graphs"] else "no graphs"
    if row["measure"] == "forward":
        found = f"{1e3 * row['verify_s']:.2f} ms, {row['verify_ratio']:.2f} of a plain step"
        return f"{where}, context {row['context']}, {row['num_nodes']} nodes, {graphs}", found
    kind = "stand-in" if row.get("stand_in") else row["target"]
    found = f"{row['tokens_per_s']:.1f} tokens/s, {row['speedup']:.2f}x at tau {row['tau']:.2f}"
    if row["host_share"] is not None:
        found += f", waits for the host {row['host_share']:.0%}"
    return f"{kind}, {row['name']}, {where}, {graphs}", found


if __name__ == "__main__":
    from specdec.cli import main

    sys.exit(main(["gpu_check", *sys.argv[1:]]))
