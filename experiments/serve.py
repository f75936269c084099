"""Serve a target with drafts over HTTP, by OpenAI's API: completions, chat, streaming, metrics."""

from __future__ import annotations

import sys
from contextlib import nullcontext

from specdec.async_engine import AsyncEngine
from specdec.config import ServeConfig
from specdec.experiments.building import sampling_params
from specdec.experiments.measurement import warm_up
from specdec.experiments.system import load_system, load_target, target_name
from specdec.garbage import set_aside
from specdec.live import LiveView


def run(config: ServeConfig, command: str) -> int:
    """Serves until SIGTERM or SIGINT, then lets requests end.

    Raises ImportError without the packages of the extra `serve`; ValueError or OSError for whatever is wrong with config or
    address before a model is loaded.
    """
    try:
        from specdec.serving import Server, ServerView, create_app
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
        name, labels = target_name(config.target), system.labels
        live = LiveView() if config.live else None
        view = None if live is None else ServerView(name, live)
        front = AsyncEngine(engine, max_waiting=config.max_waiting, watch=None if view is None else view.emitted)
        app = create_app(front, name, defaults)
        print(f"{name}, drafter {labels['drafter']}, policy {labels['policy']}, rule {labels['rule']}")
        print(f"at {address(socket)}/v1 until Ctrl-C", flush=True)
        set_aside()
        with live or nullcontext():
            # Logs are set up here, so that their lines stand above a terminal's panel.
            server = Server(app, front, drain_s=config.drain_s, access_log=config.access_log, view=view)
            server.run([socket])
    print("closed", flush=True)
    return 0


if __name__ == "__main__":
    from specdec.cli import main

    sys.exit(main(["serve", *sys.argv[1:]]))
