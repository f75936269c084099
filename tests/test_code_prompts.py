"""Prompts from Python sources: whole signatures with their docstrings, and nothing of the bodies."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest

from specdec.experiments import code_prompts

SOURCE = '''
class Box:
    def size(self, unit: str = "cm",
             scale: int = 1) -> int:
        """How large it is.

        In units.
        """
        return 3


def lonely():
    """A docstring without a body."""


def bare(x):
    return x


def long():
    """%s"""
    return 1
''' % ("x" * 900)
PROMPT = '''def size(self, unit: str = "cm",
         scale: int = 1) -> int:
    """How large it is.

    In units.
    """'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    folder = tmp_path / "lib"
    (folder / "test").mkdir(parents=True)
    (folder / "a.py").write_text(SOURCE)
    # A copy adds nothing, tests are left out, and what is no Python is passed over.
    (folder / "b.py").write_text(SOURCE)
    (folder / "test" / "c.py").write_text('def f():\n    """In a test."""\n    return 1\n')
    (folder / "d.py").write_text("def broken(:\n")
    (folder / "e.py").write_text('def g():\n    """Second."""\n    return 2\n')
    return folder


def test_prompts_are_signatures_with_docstrings(library: Path) -> None:
    assert code_prompts.code_prompts(library) == [PROMPT, 'def g():\n    """Second."""']


def test_the_file_holds_as_many_prompts_as_asked_for(library: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library))
    output = tmp_path / "code.jsonl"
    code_prompts.main(str(output))
    rows = [json.loads(line)["prompt"] for line in output.read_text().splitlines()]
    assert sorted(rows) == sorted([PROMPT, 'def g():\n    """Second."""'])
    code_prompts.main(str(output), 1)
    assert [json.loads(line)["prompt"] for line in output.read_text().splitlines()] == rows[:1]
    assert capsys.readouterr().out.endswith(f"1 prompts in {output}\n")
