"""Say what a checkpoint of a learned head is, which target it fits, and what is wrong with it."""

from __future__ import annotations

import sys

from specdec.config import HeadFilesConfig
from specdec.drafters.heads.formats import inspect_head
from specdec.experiments.head_table import print_report
from specdec.loading import model_sizes


def run(config: HeadFilesConfig, command: str) -> int:
    """Prints the report; exit status 1 where something is wrong."""
    target = None if config.model is None else model_sizes(config.model)
    report = inspect_head(
        config.path, target, layer_ids=config.layer_ids, norm_before_residual=config.norm_before_residual
    )
    print_report(report, config.model)
    return 0 if report.is_sound else 1


if __name__ == "__main__":
    from specdec.cli import main

    sys.exit(main(["inspect", *sys.argv[1:]]))
