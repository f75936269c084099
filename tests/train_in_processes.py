"""Trains tiny heads in several gloo processes and leaves weights and rows: `train_in_processes.py FOLDER COUNT`."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import multiprocessing

ROOT = Path(__file__).resolve().parent.parent


def train(rank: int, count: int, folder: Path, port: int) -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from conftest import make_tiny

    from specdec.drafters.training.initial import new_eagle, new_medusa
    from specdec.drafters.training.loop import Callbacks, Trainer
    from specdec.drafters.training.objectives import Eagle1Objective, Eagle3Objective, MedusaObjective
    from specdec.drafters.training.params import TrainingParams
    from specdec.drafters.training.records import Record, RecordSet, RecordWriter
    from specdec.drafters.training.target import TrainingTarget
    from specdec.model import PagedModel

    if count > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == count
    generator = torch.Generator().manual_seed(0)
    if accelerator.is_main_process:
        writer = RecordWriter(folder / "data", {"held_out": 0.3}, {})
        # Of very different numbers of tokens to learn, so that a mean of the processes' means would be another one.
        sizes = [(8 + i % 9, i % 6) for i in range(24)]
        texts = [torch.randint(3, 97, (size,), generator=generator) for size, _ in sizes]
        records = [
            Record(text, torch.arange(len(text)) >= start, i * 977)
            for i, (text, (_, start)) in enumerate(zip(texts, sizes, strict=True))
        ]
        writer.commit(records, {})
        writer.flush()
    accelerator.wait_for_everyone()
    target = TrainingTarget(PagedModel(make_tiny()))
    for kind in ("medusa", "eagle1", "eagle3"):
        objective = {
            "medusa": lambda: MedusaObjective(new_medusa(target, 2), target),
            "eagle1": lambda: Eagle1Objective(new_eagle(target, 1, 0), target),
            "eagle3": lambda: Eagle3Objective(
                new_eagle(target, 3, 0, torch.arange(3, 70), (0, 1, 2)), target, num_steps=3
            ),
        }[kind]()
        params = TrainingParams(num_steps=2, row_tokens=30, rows_per_step=4, log_every=1)
        rows: list[dict] = []
        trainer = Trainer(objective, target, RecordSet(folder / "data"), params, folder / kind, {}, accelerator)
        trainer.run(Callbacks(on_row=rows.append), RecordSet(folder / "data", "held_out"))
        if accelerator.is_main_process:
            numbers = {
                f"{i} {name}": value for i, row in enumerate(rows) for name, value in row.items() if name != "kind"
            }
            torch.save({"weights": objective.state_dict(), "rows": numbers}, folder / f"{kind}.pt")
        accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    place, number = Path(sys.argv[1]), int(sys.argv[2])
    place.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(train, (number, place, port), nprocs=number)
