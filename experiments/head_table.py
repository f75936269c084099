"""The report on a checkpoint of a learned head as a table."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from specdec.drafters.heads import EagleConfig, MedusaConfig
from specdec.drafters.heads.formats import HeadReport

_NAMES = {"medusa": "Medusa heads", "eagle1": "EAGLE head (EAGLE-1 and EAGLE-2)", "eagle3": "EAGLE-3 head"}
_UNITS = ("B", "KiB", "MiB", "GiB")


def print_report(report: HeadReport, model: str | None) -> None:
    """Prints a table of the report; `model` is what the target that it was compared with is called, None without one."""
    title = f"{_NAMES.get(report.drafter, 'No head that can be read')}, format {report.format}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _rows(report):
        table.add_row(name, text)
    for note in report.notes:
        table.add_row("note", note)
    for problem in report.problems:
        table.add_row("PROBLEM", problem, style="bold red")
    Console(markup=False, highlight=False).print(table)
    fit = "" if model is None else f", fits {model}" if report.is_sound else f", as a head for {model}"
    verdict = "sound" if report.is_sound else f"NOT SOUND ({len(report.problems)} problems)"
    print(f"{verdict}: {report.path}{fit}", flush=True)


def _rows(report: HeadReport) -> Iterator[tuple[str, str]]:
    if report.files:
        yield "files", f"{', '.join(report.files)}, {_size(report.num_bytes)}"
        yield "weights", f"{report.num_parameters:,} parameters, {', '.join(report.dtypes)}"
    config = report.config
    if config is None:
        return
    vocabulary = "any" if "vocab_size" in report.unknown else str(config.vocab_size)
    named = f"; made for {report.base_model}" if report.base_model else ""
    if isinstance(config, MedusaConfig):
        yield "target", f"hidden size {config.hidden_size}, vocabulary {vocabulary}, any number of layers{named}"
        yield "reads", "the state behind the target's final norm"
        yield "heads", f"{config.num_heads}, residual blocks in each: {config.num_layers}"
    else:
        layers = _layers(config, report.unknown)
        yield "target", f"hidden size {config.target_hidden_size}, vocabulary {vocabulary}, {layers}{named}"
        yield "reads", _reads(config, report.unknown)
        yield "layer", _layer(config)
        yield "embedding", "its own" if config.has_own_embedding else "the target's"
        reduced = f"{config.draft_vocab_size} of {config.vocab_size} tokens" if config.is_reduced else "every token"
        yield "drafts", reduced
    yield "LM head", "its own" if config.has_own_lm_head else "the target's"


def _layers(config: EagleConfig, unknown: tuple[str, ...]) -> str:
    if "feature_layers" in unknown or config.version == 1:
        return "3 layers or more" if config.version == 3 else "any number of layers"
    return f"{max(config.feature_layers) + 1} layers or more"


def _reads(config: EagleConfig, unknown: tuple[str, ...]) -> str:
    if config.version == 1:
        return "the state behind the target's final norm"
    if "feature_layers" in unknown:
        return "hidden states 2, L // 2 and L - 3 of a target with L layers (model= tells)"
    return f"hidden states {', '.join(map(str, config.feature_layers))} (0: embeddings, i: behind the i-th layer)"


def _layer(config: EagleConfig) -> str:
    limit = "" if config.max_positions is None else f", {config.max_positions} positions"
    order = "; the residual is normed" if config.norm_before_residual else ""
    return (
        f"hidden size {config.hidden_size}, {config.num_heads} heads of {config.head_size}, {config.num_kv_heads} of keys, "
        f"MLP {config.intermediate_size}, rope {config.rope['rope_type']} (base {config.rope['rope_theta']:g}){limit}{order}"
    )


def _size(num_bytes: float) -> str:
    for unit in _UNITS[:-1]:
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} {_UNITS[-1]}"
