"""`specdec serve` as a process: it says where it serves, ends on a signal with status 0, and tells errors in one line."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import openai
import pytest

from specdec import cli
from specdec.experiments import serve

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def serving(
    folder: Path, *words: str, stderr: int | None = None
) -> Iterator[tuple[subprocess.Popen[str], openai.OpenAI]]:
    """A server on a free port and OpenAI's client; it is gone afterwards."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        [sys.executable, "-m", "specdec.cli", "serve", "port=0", *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        # A background job of a shell ignores SIGINT, and its children with it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("at http://127.0.0.1:"))
        with openai.OpenAI(base_url=line.split()[1], api_key="none", timeout=120) as client:
            yield process, client
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(tiny, tokenizer, tmp_path: Path, number: signal.Signals) -> None:
    tiny(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    with serving(tmp_path, "target=hf", "target.path=tiny", "target.self_check=false") as (process, client):
        assert [model.id for model in client.models.list().data] == ["tiny"]
        chunks = client.completions.create(model="tiny", prompt="abcabc", max_tokens=200, stream=True)
        first = next(iter(chunks))
        process.send_signal(number)
        assert [*chunks][-1].choices[0].finish_reason in ("stop", "length") and first.choices
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and out.endswith("closed\n")


def test_a_terminal_shows_how_it_goes(tiny, tokenizer, tmp_path: Path) -> None:
    tiny(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    ours, its = pty.openpty()
    shown, has_tau = bytearray(), threading.Event()

    def read() -> None:
        # The end of a terminal is an error.
        with suppress(OSError):
            while part := os.read(ours, 65536):
                shown.extend(part)
                if b"tau" in shown:
                    has_tau.set()

    reader = threading.Thread(target=read)
    words = ("target=hf", "target.path=tiny", "target.self_check=false", "access_log=true")
    with serving(tmp_path, *words, stderr=its) as (process, client):
        os.close(its)
        reader.start()
        client.completions.create(model="tiny", prompt="abcabc", max_tokens=20)
        # What a request has made of it is there once it has ended.
        assert has_tau.wait(60), shown
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=120)
    reader.join()
    os.close(ours)
    assert b"TTFT" in shown and b"/v1/completions" in shown
    assert "tau" not in out and out.endswith("closed\n") and process.returncode == 0


@pytest.mark.real_model
def test_the_embedded_model_answers(tmp_path: Path) -> None:
    from specdec.loading import embedded_model_path

    try:
        embedded_model_path()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    with serving(tmp_path) as (process, client):
        (model,) = client.models.list().data
        question = [{"role": "user", "content": "What is the capital of France?"}]
        options = {"model": model.id, "messages": question, "temperature": 0, "max_tokens": 12}
        answer = client.chat.completions.create(**options)
        assert "Paris" in answer.choices[0].message.content
        chunks = client.chat.completions.create(**options, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("port=99999", ["127.0.0.1:99999", "port="]),
        ("host=256.1.1.1", ["256.1.1.1", "host="]),
        ("max_waiting=-1", ["max_waiting=-1"]),
        ("sampling.top_p=3", ["top_p=3.0"]),
        ("port=0 rule=rejection", ["rule=rejection", "top_k"]),
        ("prt=1", ["'prt'", "port"]),
    ],
)
def test_errors_are_one_line_before_a_model_is_loaded(
    words: str, parts: list[str], capfd, monkeypatch, tmp_path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serve, "load_target", lambda config: pytest.fail("the model was loaded"))
    assert cli.main(["serve", *words.split()]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert all(part in err for part in parts), err


def test_a_missing_package_is_named(capfd, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.startswith("specdec.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert cli.main(["serve"]) == 2
    assert "pip install 'specdec[serve]'" in capfd.readouterr().err
