"""Generate text for a prompt or a file of prompts, with drafts, and compare with plain decoding (compare=true)."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from specdec.config import GenerateConfig
from specdec.engine import Engine
from specdec.experiments.building import build, sampling_params
from specdec.experiments.measurement import Measurement, decode, warm_up
from specdec.experiments.prompts import check_chat, read_prompts, uses_chat, wrap
from specdec.experiments.report import comparison_table
from specdec.experiments.system import check_speculation, load_system, load_target, plain_system, target_labels
from specdec.garbage import set_aside
from specdec.provenance import device_name, provenance
from specdec.request import Result, Token
from specdec.sampling import SamplingParams
from specdec.tracking import Tracker


def run(config: GenerateConfig, command: str) -> int:
    """Decodes every prompt, prints text and one table, and writes a row per prompt as it finishes.

    Prompt i uses `sampling.seed`; without a seed each draws its own, the same for both sides of a comparison. Raises
    ValueError for whatever is wrong with prompts, output or the choice of rule before a model is loaded.
    """
    prompts = _prompts(config)
    params = sampling_params(config.sampling)
    each = [replace(params, seed=params.with_seed()) for _ in prompts]
    check_chat(config.chat)
    tracker: Tracker = build(config.tracking)
    try:
        tracker.start({**asdict(config), "provenance": provenance(command)})
        session = _Session.load(config, prompts, each, tracker)
        session.decode()
        session.report()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"finished rows are in {tracker.shown_path}") from None
    finally:
        tracker.finish()
    return 0


def _prompts(config: GenerateConfig) -> list[str]:
    if (config.prompt is None) == (config.prompt_file is None):
        raise ValueError("give either prompt=TEXT or prompt_file=FILE (.jsonl or .txt)")
    if config.prompt_file is None:
        return wrap([config.prompt or ""], config.template)
    return wrap(read_prompts(config.prompt_file, config.prompt_field, config.limit), config.template)


@dataclass
class _Session:
    """The prompts of one run, and the one or two systems that decode them."""

    config: GenerateConfig
    prompts: list[str]
    params: list[SamplingParams]
    tracker: Tracker
    engine: Engine
    plain: Engine | None
    chat: bool
    labels: dict[str, Any]

    def __post_init__(self) -> None:
        self.speculative_cost, self.plain_cost = Measurement(), Measurement()
        self.pairs: list[tuple[Result, Result]] = []
        self.num_rows = 0

    @staticmethod
    def load(config: GenerateConfig, prompts: list[str], params: list[SamplingParams], tracker: Tracker) -> _Session:
        check_speculation(config.engine)
        system = load_system(config)
        target = load_target(config.target)
        chat = uses_chat(config.chat, target.tokenizer)
        labels = {
            **target_labels(config.target),
            **system.labels,
            "temperature": config.sampling.temperature,
            "batch_size": min(config.engine.max_batch_size, len(prompts)),
            "dtype": str(target.dtype).removeprefix("torch."),
            "numerics": target.numerics,
            "num_threads": torch.get_num_threads(),
            "device": device_name(target.device),
            "chat": chat,
            "speculation": system.speculation(config.engine),
        }
        engine = system.engine(target, config.engine)
        plain = plain_system(system.rule).engine(target, config.engine) if config.compare else None
        return _Session(config, prompts, params, tracker, engine, plain, chat, labels)

    def decode(self) -> None:
        """Plain and speculative take turns, batch by batch, so that a machine that slows down slows both."""
        for engine in filter(None, (self.engine, self.plain)):
            warm_up(engine, self.prompts[0], self.chat)
        set_aside()
        if len(self.prompts) == 1:
            self._decode_batch(0, 1, _print_token, True)
            print(flush=True)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("prompts", total=len(self.prompts))

            def advance(token: Token) -> None:
                if token.result is not None:
                    progress.advance(task)

            size = self.config.engine.max_batch_size if self.plain is not None else len(self.prompts)
            for number, first in enumerate(range(0, len(self.prompts), size)):
                self._decode_batch(first, first + size, advance, number % 2 == 0)

    def _decode_batch(self, first: int, end: int, on_token: Any, speculative_first: bool) -> None:
        prompts, params = self.prompts[first:end], self.params[first:end]

        def take(token: Token) -> None:
            if token.result is not None and self.plain is None:
                self._write(token.result, None, first)
            on_token(token)

        def speculative() -> list[Result]:
            return decode(self.engine, prompts, params, self.chat, self.speculative_cost, take)

        def plain() -> list[Result]:
            return [] if self.plain is None else decode(self.plain, prompts, params, self.chat, self.plain_cost)

        if speculative_first:
            drafted, undrafted = speculative(), plain()
        else:
            undrafted, drafted = plain(), speculative()
        for one, other in zip(drafted, undrafted, strict=False):
            self._write(one, other, first)
            self.pairs.append((one, other))

    def _write(self, result: Result, plain: Result | None, first: int) -> None:
        metrics = result.metrics
        row: dict[str, Any] = {
            "index": first + result.index,
            "prompt": result.prompt,
            "prompt_token_ids": result.prompt_token_ids,
            "token_ids": result.token_ids,
            "text": result.text,
            "seed": result.seed,
            "finish_reason": result.finish_reason,
            "num_target_forwards": metrics.num_target_forwards,
            "tau": metrics.tau,
            "tokens_per_s": metrics.tokens_per_s,
            "ttft_s": metrics.ttft_s,
            "itl_p50_s": metrics.itl_p50_s,
            "itl_p95_s": metrics.itl_p95_s,
            "itl_p99_s": metrics.itl_p99_s,
            "num_drafted": metrics.num_drafted,
            "drafted_by_depth": metrics.drafted_by_depth,
            "accepted_by_depth": metrics.accepted_by_depth,
            "acceptance_by_depth": metrics.acceptance_by_depth,
            **self.labels,
        }
        if result.logprobs is not None:
            row["logprobs"] = result.logprobs
        if plain is not None:
            row["plain"] = {
                "token_ids": plain.token_ids,
                "tokens_per_s": plain.metrics.tokens_per_s,
                "ttft_s": plain.metrics.ttft_s,
            }
        self.tracker.row(row)
        self.num_rows += 1

    def report(self) -> None:
        plain = self.plain_cost if self.plain is not None else None
        Console(markup=False, highlight=False).print(
            comparison_table(self.labels, self.speculative_cost, plain, self.pairs)
        )
        print(f"{self.num_rows} {'row' if self.num_rows == 1 else 'rows'} in {self.tracker.shown_path}", flush=True)
        cost = self.speculative_cost
        summary = {"tau": cost.tau, "tokens_per_s": cost.tokens_per_s, "ttft_s": cost.mean_ttft_s}
        if plain is not None:
            summary |= {"plain_tokens_per_s": plain.tokens_per_s, "speedup": cost.tokens_per_s / plain.tokens_per_s}
        self.tracker.summary(summary)


def _print_token(token: Token) -> None:
    sys.stdout.write(token.text)
    sys.stdout.flush()


if __name__ == "__main__":
    from specdec.cli import main

    sys.exit(main(["generate", *sys.argv[1:]]))
