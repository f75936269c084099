"""Prove by enumeration that rules keep the target's law on the trees they take, and that known mistakes would be caught."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from specdec.certificates import Certificate, certify
from specdec.certificates.mutants import MUTANTS, Trial, attempt
from specdec.certificates.suite import Draft, combinations
from specdec.config import CertifyConfig
from specdec.experiments.certificate_report import mutant_row, rule_row, rules_table, save_picture, verdict
from specdec.provenance import provenance
from specdec.verifiers import RULES


def run(config: CertifyConfig, command: str) -> int:
    """Certifies every chosen rule on every policy it takes, and tries all mutants; writes `output` and a picture beside it.

    Returns 1 where a lossless rule is not exact or a mutant is not caught. Raises ValueError for what can be seen to be
    wrong before anything is computed.
    """
    chosen = list(combinations(config.level, config.rules))
    path = _output(config.output)
    # The tensors are small and many: threads would only cost.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        certificates, trials = _prove(chosen)
    finally:
        torch.set_num_threads(threads)
    passed = all(one.holds for one in certificates) and all(trial.caught for trial in trials)
    report = {
        "rules": [rule_row(one) for one in certificates],
        "mutants": [mutant_row(trial) for trial in trials],
        "real": [],
        "numerics": {},
        "passed": passed,
        "level": config.level,
        **provenance(command),
    }
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    picture = path.with_suffix(".png")
    save_picture(certificates, picture)
    console = Console(markup=False, highlight=False)
    console.print(rules_table(certificates))
    print(f"{verdict(certificates, trials, passed)}\n{path}\n{picture}", flush=True)
    return 0 if passed else 1


def _prove(chosen: list[tuple[str, Draft]]) -> tuple[list[Certificate], list[Trial]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    certificates, trials = [], []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("certificates", total=len(chosen) + len(MUTANTS))
        for name, draft in chosen:
            progress.update(task, description=f"{name} on {draft.name}")
            certificates.append(
                certify(RULES[name](), draft.policy, vocabs=draft.vocabs, length=draft.length, tree=draft.name)
            )
            progress.advance(task)
        for mutant in MUTANTS:
            progress.update(task, description=f"mutant: {mutant.name}")
            trials.append(attempt(mutant))
            progress.advance(task)
    return certificates, trials


def _output(text: str) -> Path:
    """The file of the results, found to be writable before minutes are spent on them."""
    path = Path(text)
    if path.suffix != ".json":
        raise ValueError(f"output={text} must end in .json; the picture takes the same name with .png")
    try:
        is_new = not path.exists()
        path.open("a").close()
    except OSError as error:
        raise ValueError(f"cannot write to {path}: {error.strerror or error}") from error
    if is_new:
        path.unlink()
    return path


if __name__ == "__main__":
    from specdec.cli import main

    sys.exit(main(["certify", *sys.argv[1:]]))
