"""A worker of a peer: another library in a process and an environment of its own, stopped while it is not its turn."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# How long a worker that has closed its end may take to be gone.
_PATIENCE_S = 10.0


class Worker:
    """Speaks the protocol of `experiments/peers/protocol.py` with a script that `python` runs; `folder` is where it works, and
    holds its log.

    Between questions the worker and all it has started are stopped (SIGSTOP): threads that spin while they wait for work would
    slow down whoever is measured meanwhile. Raises ValueError where it answers with an error, or dies.
    """

    def __init__(self, name: str, python: str, script: Path, folder: Path, env: Mapping[str, str]) -> None:
        self.name, self._log = name, folder / "worker.log"
        folder.mkdir(parents=True, exist_ok=True)
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [python, str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                # What lies in the user's own folder must not hide a module of the peer's, nor one of ours.
                cwd=folder,
                env={**{key: value for key, value in os.environ.items() if key != "PYTHONPATH"}, **env},
                text=True,
                encoding="utf-8",
                # A group of its own can be stopped as a whole, and Ctrl-C is for us alone to hear.
                start_new_session=True,
            )

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one line, for which the worker goes on and then stops again."""
        with self._running():
            assert self._process.stdin is not None and self._process.stdout is not None
            line = ""
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(question) + "\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline()
            if not line.endswith("\n"):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_PATIENCE_S)
        if not line.endswith("\n"):
            status = self._process.poll()
            raise ValueError(
                f"{self.name}: its worker died (exit status {status}): {self._last_words()}; see {self._log}"
            )
        try:
            answer = json.loads(line)
        except json.JSONDecodeError:
            raise ValueError(f"{self.name}: its worker answered {line[:80]!r}, which is not JSON") from None
        if "error" in answer:
            raise ValueError(f"{self.name}: {answer['error']}; see {self._log}")
        return answer

    def close(self) -> None:
        """Ends it and all it has started, whatever they are at."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._signal("SIGKILL")
        self._process.wait()
        self._process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    @contextmanager
    def _running(self) -> Iterator[None]:
        self._signal("SIGCONT")
        try:
            yield
        finally:
            self._signal("SIGSTOP")

    def _signal(self, name: str) -> None:
        """To the whole group, if any of it is left."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, getattr(signal, name))

    def _last_words(self) -> str:
        with self._log.open(encoding="utf-8", errors="replace") as log:
            lines = deque((line.strip() for line in log if line.strip()), maxlen=1)
        return lines[0][:300] if lines else "it said nothing"
