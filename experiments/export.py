"""Write a learned head in another format: medusa, eagle, eagle3, vllm, speculators or specdec."""

from __future__ import annotations

import sys
from pathlib import Path

from specdec.config import ExportConfig
from specdec.drafters.heads.formats import FORMATS, export_head, inspect_head
from specdec.experiments.head_table import print_report
from specdec.loading import DTYPES, model_sizes


def run(config: ExportConfig, command: str) -> int:
    """Writes the head and reads it back; exit status 1 where what was written is not sound.

    Raises ValueError for an unknown format and for an output folder that holds files, before anything is read.
    """
    if config.format not in FORMATS:
        raise ValueError(f"format={config.format} is unknown; use one of {', '.join(FORMATS)}")
    if config.dtype != "auto" and config.dtype not in DTYPES:
        raise ValueError(f"dtype={config.dtype} is unknown; use auto, {', '.join(DTYPES)}")
    output = Path(config.output).expanduser()
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ValueError(f"output={config.output} is not empty; name a new folder")
    target = None if config.model is None else model_sizes(config.model)
    written = export_head(
        config.path,
        output,
        config.format,
        target,
        layer_ids=config.layer_ids,
        norm_before_residual=config.norm_before_residual,
        base_model=config.base_model,
        dtype=DTYPES.get(config.dtype),
    )
    report = inspect_head(written, target)
    print_report(report, config.model)
    print(f"{config.format}: {written}", flush=True)
    return 0 if report.is_sound else 1


if __name__ == "__main__":
    from specdec.cli import main

    sys.exit(main(["export", *sys.argv[1:]]))
