"""Other systems as contenders: each mode of each peer is a worker in the peer's own environment."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from specdec.config import PeerConfig, PeerModeConfig
from specdec.experiments.contenders import PLAIN, Decoded
from specdec.experiments.worker import Worker
from specdec.sampling import SamplingParams

SCRIPTS = Path(__file__).resolve().parent / "peers"
FORMATS = ("folder", "gguf")


@dataclass
class PeerContender:
    """A worker that has loaded the model and knows the ids that end a text."""

    name: str
    worker: Worker
    eos_token_ids: list[int]
    labels: dict[str, Any]
    versions: dict[str, str]
    max_batch_size: int | None

    def decode(self, prompts: list[list[int]], params: SamplingParams) -> Decoded:
        """Greedy. Raises ValueError where what comes back is no decoding of these prompts."""
        stops = [] if params.ignore_eos else self.eos_token_ids
        batch = {"prompts": prompts, "max_new_tokens": params.max_new_tokens, "stop_token_ids": stops}
        answer = self.worker.ask(batch)
        try:
            decoded = Decoded(**answer)
        except TypeError as error:
            raise ValueError(f"{self.name}: its worker's answer does not fit: {error}") from None
        if len(decoded.outputs) != len(prompts):
            raise ValueError(f"{self.name}: {len(decoded.outputs)} outputs for {len(prompts)} prompts")
        for output in decoded.outputs:
            ended = bool(output) and output[-1] in stops
            if len(output) > params.max_new_tokens or not (ended or len(output) == params.max_new_tokens):
                raise ValueError(
                    f"{self.name}: {len(output)} new tokens that do not end in a stop token, where {params.max_new_tokens} "
                    f"were asked for"
                )
        return decoded


@dataclass(frozen=True)
class PeerJob:
    """What every worker is to load: the target by format, the draft model's folder and what rows call it."""

    targets: Mapping[str, Path]
    draft: Path | None
    draft_name: str | None
    dtype: str
    num_threads: int
    max_length: int
    max_batch_size: int
    eos_token_ids: list[int]


def present(peers: Mapping[str, PeerConfig]) -> dict[str, PeerConfig]:
    """The peers that take part, those with an interpreter. Raises ValueError for what cannot be, before anything is loaded."""
    found = {name: peer for name, peer in peers.items() if peer.python is not None}
    for name, peer in found.items():
        if shutil.which(str(peer.python)) is None:
            raise ValueError(f"peers.{name}.python={peer.python} is no program: give the environment's bin/python")
        if not (SCRIPTS / peer.worker).is_file():
            raise ValueError(f"peers.{name}.worker={peer.worker}: no such file")
        if peer.model_format not in FORMATS:
            raise ValueError(f"peers.{name}.model_format={peer.model_format} must be {' or '.join(FORMATS)}")
        if [mode.drafter for mode in peer.modes.values()].count(PLAIN) != 1:
            raise ValueError(
                f"peers.{name}.modes must hold one with drafter={PLAIN}: what its others are compared with"
            )
    return found


def peer_contenders(
    peers: Mapping[str, PeerConfig], job: PeerJob, work_dir: Path, stack: ExitStack
) -> list[PeerContender]:
    """Starts a worker for each mode, one after another; `stack` ends them."""
    found = []
    for system, peer in peers.items():
        for mode_name, mode in peer.modes.items():
            if mode.needs_draft and job.draft is None:
                continue
            name = f"{system} {mode_name}"
            env = {"OMP_NUM_THREADS": str(job.num_threads), **{key: str(one) for key, one in dict(peer.env).items()}}
            folder = (work_dir / "workers" / name.replace(" ", "-")).resolve()
            # `which` keeps a link as it is: the interpreter of a virtual environment is one.
            python = str(Path(shutil.which(str(peer.python)) or "").absolute())
            worker = Worker(name, python, SCRIPTS / peer.worker, folder, env)
            stack.callback(worker.close)
            question = {
                "model": str(job.targets[peer.model_format].resolve()),
                "draft": str(job.draft.resolve()) if mode.needs_draft and job.draft is not None else None,
                "dtype": job.dtype,
                "num_threads": job.num_threads,
                "max_length": job.max_length,
                "max_batch_size": min(job.max_batch_size, peer.max_batch_size or job.max_batch_size),
                "options": mode.options,
            }
            # Loading may convert or compile the model, which takes minutes the first time.
            with Console(stderr=True).status(f"loading {name}"):
                version = str(worker.ask(question).get("version"))
            labels = _labels(system, mode, job.draft_name)
            found.append(PeerContender(name, worker, job.eos_token_ids, labels, {system: version}, peer.max_batch_size))
    return found


def _labels(system: str, mode: PeerModeConfig, draft: str | None) -> dict[str, Any]:
    return {
        "system": system,
        "drafter": f"{mode.drafter}({draft})" if mode.needs_draft else mode.drafter,
        "policy": f"chain(depth={mode.depth})" if mode.depth else "none",
        "rule": system,
        "num_nodes": mode.depth + 1,
        "lossless": True,
        "options": mode.options,
    }
