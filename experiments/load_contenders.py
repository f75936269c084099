"""What serves a load: engines of this library and transformers' own batching, built by name."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

from specdec.config import EngineConfig, LoadConfig
from specdec.experiments.driving import Clock, Server
from specdec.experiments.servers import EngineServer
from specdec.experiments.system import System, plain_system
from specdec.experiments.transformers_servers import ContinuousServer, StaticServer
from specdec.model import PagedModel

PLAIN, FIXED, ADAPTIVE = "plain", "fixed", "adaptive"
STATIC, CONTINUOUS = "transformers", "transformers_continuous"
CONTENDERS = (PLAIN, FIXED, ADAPTIVE, STATIC, CONTINUOUS)


@dataclass(frozen=True)
class LoadContender:
    """`serve` makes a server with nothing in it: no pages, no prefixes, no statistics of an earlier load. `labels` are the
    fields of a result row that say what it is."""

    name: str
    share_prefixes: bool
    labels: dict[str, Any]
    serve: Callable[[], Server]


def check_contenders(config: LoadConfig) -> None:
    """Raises ValueError for a contender that is unknown, named twice, or cannot serve this load."""
    names = list(config.contenders)
    for name in names:
        if name not in CONTENDERS:
            raise ValueError(f"contenders: {name} is unknown; choose from {', '.join(CONTENDERS)}")
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"contenders={names} must name at least one, each once")
    if PLAIN not in names:
        raise ValueError(f"contenders={names}: {PLAIN} must be among them, its texts are what all are compared with")
    if len(set(config.share_prefixes)) < len(config.share_prefixes):
        raise ValueError(f"share_prefixes={list(config.share_prefixes)} must name each choice once")
    if {FIXED, ADAPTIVE} & set(names) and not hasattr(config.drafter, "policy"):
        raise ValueError(f"drafter={config.drafter.label} drafts nothing: choose another, or leave {FIXED} out")
    if {STATIC, CONTINUOUS} & set(names) and config.sampling.temperature > 0:
        raise ValueError(
            f"sampling.temperature={config.sampling.temperature}: transformers draws from chance of its own, so that texts "
            f"and lengths would differ; leave {STATIC} and {CONTINUOUS} out, or give sampling=greedy"
        )


def build_contenders(
    config: LoadConfig,
    system: System | None,
    target: PagedModel,
    theirs: PagedModel | None,
    longest: int,
    ignore_eos: bool,
    clock: Clock,
) -> list[LoadContender]:
    """Every contender with every choice of sharing that changes it.

    `system` is what drafts (None: nobody does), `theirs` the model that transformers runs (None: it does not), `longest`
    the tokens of the longest request, `ignore_eos` whether requests run to their full length.
    """
    found: list[LoadContender] = []
    choices = list(config.share_prefixes) or [config.engine.share_prefixes]
    for share in choices:
        engine = replace(config.engine, share_prefixes=share) if config.share_prefixes else config.engine
        for name in config.contenders:
            if name in (PLAIN, FIXED, ADAPTIVE):
                found.append(_of_engine(name, share, config, engine, system, target, clock))
            elif name == CONTINUOUS:
                assert theirs is not None
                found.append(_continuous(theirs, engine, longest, share, ignore_eos))
            elif share == choices[0]:
                # Static batches share nothing: they are served once.
                assert theirs is not None
                found.append(_static(theirs, engine, clock))
    return found


def _of_engine(
    name: str,
    share: bool,
    config: LoadConfig,
    engine: EngineConfig,
    system: System | None,
    target: PagedModel,
    clock: Clock,
) -> LoadContender:
    if name == PLAIN:
        chosen = plain_system(None if system is None else system.rule)
    else:
        assert system is not None
        chosen = system
    engine = replace(engine, speculation=ADAPTIVE) if name == ADAPTIVE else engine
    labels = {"system": "specdec", "speculation": name, **chosen.labels}
    return LoadContender(name, share, labels, lambda: EngineServer(chosen.engine(target, engine), clock))


def _static(target: PagedModel, engine: EngineConfig, clock: Clock) -> LoadContender:
    size = engine.max_batch_size
    return LoadContender(STATIC, False, _labels("static"), lambda: StaticServer(target, size, clock))


def _continuous(target: PagedModel, engine: EngineConfig, longest: int, share: bool, ignore_eos: bool) -> LoadContender:
    return LoadContender(
        CONTINUOUS,
        share,
        _labels("continuous"),
        lambda: ContinuousServer(target, engine, longest, share, ignore_eos),
    )


def _labels(batching: str) -> dict[str, Any]:
    return {
        "system": "transformers",
        "speculation": PLAIN,
        "drafter": PLAIN,
        "policy": "none",
        "rule": "transformers",
        "num_nodes": 1,
        "lossless": True,
        "batching": batching,
    }


def contender_names(contenders: Seq[LoadContender]) -> dict[str, LoadContender]:
    """By a name that is unique in one load: where both choices of sharing are served, it says which."""
    both = len({one.share_prefixes for one in contenders if one.name != STATIC}) > 1
    suffix = {True: "", False: ", nothing shared"}
    return {one.name + (suffix[one.share_prefixes] if both and one.name != STATIC else ""): one for one in contenders}
