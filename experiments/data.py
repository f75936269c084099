"""Make training data for heads: the target answers prompts, its own or given ones; or plain text in windows."""

from __future__ import annotations

import glob
import sys
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from specdec.config import (
    DataConfig,
    DatasetSourceConfig,
    PromptsSourceConfig,
    SelfSourceConfig,
    SourceConfig,
    TextSourceConfig,
)
from specdec.drafters.training.collect import collect
from specdec.drafters.training.exclusion import Exclusion
from specdec.drafters.training.records import RecordWriter
from specdec.drafters.training.sources import Answers, Documents, GivenPrompts, SelfPrompts, Source
from specdec.experiments.building import sampling_params
from specdec.experiments.prompts import read_documents, read_prompts, wrap
from specdec.experiments.system import load_target, plain_system, target_labels
from specdec.model import PagedModel
from specdec.provenance import provenance
from specdec.sampling import SamplingParams

# A run's own choices: they do not change what a record is, so a folder can go on with other ones.
_FREE = ("folder", "num_records", "shard_size")


def run(config: DataConfig, command: str) -> int:
    """Fills `folder` until it holds `num_records` records; a folder begun before goes on where it was stopped.

    Raises ValueError for what can be seen to be wrong before the target is loaded, and for a folder of other settings.
    """
    _check(config)
    exclusion = Exclusion([text for file in config.exclude for text in read_prompts(file)], config.exclude_ngram)
    given = _given_texts(config.source)
    writer = RecordWriter(config.folder, _settings(config, exclusion), provenance(command), config.shard_size)
    target = load_target(config.target)
    source = _source(config, target, given)
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("records"), *columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("records", total=config.num_records, completed=writer.num_records)
        try:
            collect(source, writer, exclusion, config.num_records, lambda count: progress.update(task, completed=count))
        except KeyboardInterrupt:
            message = f"{writer.num_records} records are in {config.folder}; the same command goes on from there"
            raise KeyboardInterrupt(message) from None
    _report(writer)
    return 0


def _check(config: DataConfig) -> None:
    if config.num_records is None and isinstance(config.source, SelfSourceConfig):
        raise ValueError("num_records=null never ends with source=self: give num_records=N")
    if config.num_records is not None and config.num_records < 1:
        raise ValueError(f"num_records={config.num_records} must be >= 1")
    if not 0 <= config.held_out < 1:
        raise ValueError(f"held_out={config.held_out} must be in [0, 1)")
    if config.max_length < 8:
        raise ValueError(f"max_length={config.max_length} must be >= 8")
    if config.sampling.stop:
        raise ValueError("sampling.stop cuts text and not tokens, so it makes no training data: leave it out")
    sampling_params(config.sampling)


def _settings(config: DataConfig, exclusion: Exclusion) -> dict[str, Any]:
    """What makes a record what it is."""
    values = {key: value for key, value in asdict(config).items() if key not in (*_FREE, "exclude", "target")}
    return {
        **target_labels(config.target),
        "dtype": config.target.dtype,
        **values,
        "source": {"kind": config.source.label, **values["source"]},
        "excluded": exclusion.fingerprint,
    }


def _given_texts(source: SourceConfig) -> list[str]:
    if isinstance(source, PromptsSourceConfig):
        return wrap(read_prompts(source.prompt_file, source.prompt_field), source.template)
    if isinstance(source, TextSourceConfig):
        files = sorted(glob.glob(source.files, recursive=True))
        if not files:
            raise ValueError(f"source.files={source.files} matches no file")
        return [text for file in files for text in read_documents(file, source.field)]
    if isinstance(source, DatasetSourceConfig):
        return _dataset_prompts(source)
    return []


def _dataset_prompts(source: DatasetSourceConfig) -> list[str]:
    from datasets import load_dataset

    try:
        rows: Any = load_dataset(source.path, source.name, data_files=source.data_files, split=source.split)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"source.path={source.path} cannot be loaded ({type(error).__name__}: {reason})") from error
    if source.field not in rows.column_names:
        raise ValueError(f"source.field={source.field} is none of the columns {', '.join(rows.column_names)}")
    return [text for value in rows[source.field] if (text := _first_user_text(value))]


def _first_user_text(value: Any) -> str:
    """A text as it is; of messages, under either spelling of their keys, the first that a user wrote."""
    if isinstance(value, str):
        return value
    for message in value if isinstance(value, list) else []:
        if message.get("role", message.get("from")) in ("user", "human"):
            return str(message.get("content", message.get("value")) or "")
    return ""


def _source(config: DataConfig, target: PagedModel, given: list[str]) -> Source:
    if isinstance(config.source, TextSourceConfig):
        if target.tokenizer is None:
            raise ValueError(f"{target.name} was loaded without a tokenizer: it cannot read text")
        return Documents(given, target.tokenizer, config.max_length, config.source.min_length)
    if target.max_positions is not None and config.max_length > target.max_positions:
        raise ValueError(f"max_length={config.max_length} is more than {target.name} takes: {target.max_positions}")
    engine = plain_system().engine(target, config.engine)
    answers = Answers(engine, sampling_params(config.sampling), config.seed, config.max_length)
    if isinstance(config.source, SelfSourceConfig):
        own = SamplingParams(
            temperature=config.source.temperature,
            top_p=config.source.top_p,
            max_new_tokens=config.source.max_prompt_tokens,
        )
        return SelfPrompts(answers, own, config.engine.max_batch_size)
    return GivenPrompts(answers, given, config.engine.max_batch_size)


def _report(writer: RecordWriter) -> None:
    title = f"{writer.folder}: {writer.num_records} records ({writer.num_resumed} from before)"
    table = Table(title=title, min_width=60)
    table.add_column("of the texts offered")
    table.add_column("", justify="right")
    for reason, count in writer.counts.items():
        table.add_row(reason.replace("_", " "), str(count))
    Console(markup=False, highlight=False).print(table)


if __name__ == "__main__":
    from specdec.cli import main

    sys.exit(main(["data", *sys.argv[1:]]))
