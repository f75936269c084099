"""Check that requests that come, go and preempt each other say what each says alone by plain decoding."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from specdec.config import EngineConfig, StreamCheckConfig
from specdec.engine import Engine
from specdec.experiments.campaign import campaign
from specdec.experiments.contenders import system_config
from specdec.experiments.resume import Measurements, digest
from specdec.experiments.streams import Stream, StreamResult, differing, draw_stream, run_stream
from specdec.experiments.system import (
    SAME_TEXT,
    System,
    load_system,
    load_target,
    plain_system,
    rule_and_policy,
    target_labels,
)
from specdec.experiments.workload import LoadRequest, Workload
from specdec.garbage import set_aside
from specdec.live import LiveState, LiveView, Meter, engine_gauges
from specdec.model import PagedModel
from specdec.provenance import device_name, provenance
from specdec.request import Token


def run(config: StreamCheckConfig, command: str) -> int:
    """Runs every stream and every request alone, appends one row to `output`, and returns 1 where any text differs.

    What is finished goes to raw.jsonl in `work_dir` at once; a restart with the same `work_dir` goes on from there. Raises
    ValueError for what can be seen to be wrong before a model is loaded.
    """
    workload = _check(config)
    names = [*config.systems, *(config.draft_systems if config.draft is not None else [])]
    configs = {name: system_config(name, config.target, config.draft) for name in names}
    for name, one in configs.items():
        rule, _ = rule_and_policy(one)
        if rule.name not in SAME_TEXT and max(config.temperatures) > 0:
            raise ValueError(
                f"systems: {name}: under rule={rule.name} a text is another one than plain decoding's, and no worse; use "
                f"rule={' or '.join(SAME_TEXT)}, or temperatures=[0]"
            )
    with campaign(config, command, "streams") as work:
        target = load_target(config.target)
        systems = {name: load_system(one) for name, one in configs.items()}
        requests = workload.requests(target, config.num_requests)
        check = _Check(config, target, systems, work.raw)
        set_aside()
        with LiveView() as view:
            row = check.row(requests, view)
        row |= {**provenance(command), "resumed_measurements": work.raw.num_resumed}
        work.tracker.row(row)
        work.tracker.summary({"num_differing": row["num_differing"]})
    print(
        f"{row['num_requests']} requests, {row['num_cancelled']} cancelled, {row['num_preemptions']} preemptions, "
        f"{row['num_prefix_tokens']} prompt tokens shared: {row['num_differing']} differ from plain decoding alone; "
        f"row in {work.tracker.shown_path}",
        flush=True,
    )
    return 0 if row["passed"] else 1


def _check(config: StreamCheckConfig) -> Workload:
    if config.num_requests < 1 or config.stream_length < 1:
        raise ValueError(f"num_requests={config.num_requests} and stream_length={config.stream_length} must be >= 1")
    if not config.systems or not config.temperatures or not 0 <= config.cancel_share <= 1:
        raise ValueError(
            f"systems and temperatures must each name at least one, cancel_share={config.cancel_share} lie in [0, 1]"
        )
    workload = Workload.read(config)
    for temperature in config.temperatures:
        replace(workload.params, temperature=temperature)
    return workload


@dataclass
class _Check:
    """The systems whose engines streams go through, one after the other, and what is finished already."""

    config: StreamCheckConfig
    target: PagedModel
    systems: dict[str, System]
    raw: Measurements

    def __post_init__(self) -> None:
        self._plain: dict[str, Engine] = {}
        self._num_done = 0
        self._common = {
            **target_labels(self.config.target),
            "dtype": str(self.target.dtype).removeprefix("torch."),
            "numerics": self.target.numerics,
            "device": device_name(self.target.device),
        }

    def row(self, requests: Seq[LoadRequest], view: LiveView) -> dict[str, Any]:
        names = list(self.systems)
        size = self.config.stream_length
        wrong: list[str] = []
        reasons: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for number, first in enumerate(range(0, len(requests), size)):
            name = names[number % len(names)]
            system, part = self.systems[name], requests[first : first + size]
            stream = draw_stream(
                part, self.config.temperatures, self.config.cancel_share, _scratch(system), self.config.seed, number
            )
            result = self._streamed(name, stream, view, len(requests))
            alone = {str(one.index): self._alone(system, one) for one in stream.requests}
            wrong += [f"{index}: {name}" for index in differing(result, alone)]
            reasons.update(result.finish_reasons.values())
            counts.update(
                num_steps=result.num_steps,
                num_preemptions=result.num_preemptions,
                num_prefix_tokens=result.num_prefix_tokens,
                num_streams=1,
                num_tokens=sum(map(len, result.token_ids.values())),
            )
            self._num_done += len(part)
        return {
            "experiment": "stream_check",
            "system": "specdec",
            "systems": names,
            **self._common,
            "prompts": self.config.prompts or Path(self.config.prompt_file or "").stem,
            "temperatures": list(self.config.temperatures),
            "prefix_tokens": self.config.prefix_tokens,
            "prefix_share": self.config.prefix_share,
            "seed": self.config.seed,
            "num_requests": len(requests),
            "num_cancelled": reasons["cancelled"],
            "finish_reasons": dict(reasons),
            **counts,
            "num_differing": len(wrong),
            "differing": wrong[:20],
            "passed": not wrong,
        }

    def _streamed(self, name: str, stream: Stream, view: LiveView, total: int) -> StreamResult:
        key = digest("stream", name, self.systems[name].labels, asdict(stream), self._common)
        found = self.raw.get(key)
        if found is not None:
            return StreamResult(**found["result"])
        engine = self.systems[name].engine(self.target, stream.engine)
        meter = Meter()
        sizes = f"batch {stream.engine.max_batch_size}, chunk {stream.engine.prefill_chunk}"
        title = f"{name}, {sizes}, {stream.engine.num_pages} pages of {stream.engine.page_size}"

        def watch(tokens: list[Token]) -> None:
            meter.emitted(tokens)
            view.show(
                lambda: LiveState(
                    title,
                    self._num_done + meter.num_ended,
                    total,
                    meter.tokens_per_s,
                    meter.latency,
                    engine_gauges(engine),
                )
            )

        result = run_stream(engine, stream, watch)
        self.raw.put(key, system=name, result=asdict(result))
        view.note(f"{title}: {len(stream.requests)} requests, {result.num_preemptions} preemptions")
        return result

    def _alone(self, system: System, request: LoadRequest) -> tuple[list[int], str]:
        """By plain decoding, with nobody beside it."""
        plain = plain_system(system.rule)
        key = digest("alone", plain.labels, request.prompt, asdict(request.params), self._common)
        found = self.raw.get(key)
        if found is None:
            if plain.rule.name not in self._plain:
                sizes = EngineConfig(max_batch_size=1, share_prefixes=False)
                self._plain[plain.rule.name] = plain.engine(self.target, sizes)
            result = self._plain[plain.rule.name].generate([request.prompt], request.params)[0]
            found = {"token_ids": result.token_ids, "text": result.text}
            self.raw.put(key, request=request.index, **found)
        return found["token_ids"], found["text"]


def _scratch(system: System) -> int:
    """Slots behind the final tokens that a step of the system may write."""
    return 1 if system.policy is None else max(system.policy.max_nodes, system.policy.max_expanded)


if __name__ == "__main__":
    from specdec.cli import main

    sys.exit(main(["stream_check", *sys.argv[1:]]))
