"""Serve a target with drafts over HTTP, by OpenAI's API: completions, chat, streaming, metrics."""

from __future__ import annotations

import sys

from specdec.async_engine import AsyncEngine
from specdec.config import ServeConfig
from specdec.experiments.building import sampling_params
from specdec.experiments.measurement import warm_up
from specdec.experiments.system import load_system, load_target, target_name
from specdec.garbage import set_aside


def run(config: ServeConfig, command: str) -> int:
    """Serves until SIGTERM or SIGINT, then lets requests end.

    Raises ImportError without the packages of the extra `serve`; ValueError or OSError for whatever is wrong with config or
    address before a model is loaded.
    """
    try:
        from specdec.serving import Server, create_app
        from specdec.serving.server import address, bind
    except ModuleNotFoundError as error:
        raise ImportError(f"no package {error.name}, which serving needs: pip install 'specdec[serve]'") from error
    if config.max_waiting < 0 or config.drain_s < 0:
        raise ValueError(f"max_waiting={config.max_waiting} and drain_s={config.drain_s} must be >= 0")
    defaults = sampling_params(config.sampling)
    with bind(config.host, config.port) as socket:
        system = load_system(config)
        engine = system.engine(load_target(config.target), config.engine)
        warm_up(engine, [0] * 8, chat=False)
        front = AsyncEngine(engine, max_waiting=config.max_waiting)
        name = target_name(config.target)
        server = Server(create_app(front, name, defaults), front, drain_s=config.drain_s, access_log=config.access_log)
        labels = system.labels
        print(f"{name}, drafter {labels['drafter']}, policy {labels['policy']}, rule {labels['rule']}")
        print(f"at {address(socket)}/v1 until Ctrl-C", flush=True)
        set_aside()
        server.run([socket])
    print("closed", flush=True)
    return 0


if __name__ == "__main__":
    from specdec.cli import main

    sys.exit(main(["serve", *sys.argv[1:]]))
