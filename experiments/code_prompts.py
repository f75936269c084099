"""Write prompts for training data from Python's standard library: signatures with docstrings, whose bodies are to be written.

    python -m specdec.experiments.code_prompts OUTPUT.jsonl [NUM]

The library is under the PSF licence, which permits this use.
"""

from __future__ import annotations

import ast
import json
import random
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "encodings"}
# Characters of a prompt; longer ones are mostly tables.
_MAX_CHARS = 900


def code_prompts(folder: Path) -> list[str]:
    """The signature and docstring of every documented function below `folder`, in the order of files."""
    found: list[str] = []
    for file in sorted(folder.rglob("*.py")):
        if _LEFT_OUT.isdisjoint(file.relative_to(folder).parts):
            found += _prompts_of(file.read_text(encoding="utf-8", errors="ignore"))
    return list(dict.fromkeys(found))


def _prompts_of(source: str) -> Iterator[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            # From the line of `def` to the docstring's last.
            text = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.body[0].end_lineno]))
            if len(text) <= _MAX_CHARS:
                yield text


def main(output: str, num: int | None = None) -> None:
    prompts = code_prompts(Path(sysconfig.get_path("stdlib")))
    random.Random(0).shuffle(prompts)
    with open(output, "w", encoding="utf-8") as file:
        for prompt in prompts[:num]:
            file.write(json.dumps({"prompt": prompt}) + "\n")
    print(f"{len(prompts[:num])} prompts in {output}")


if __name__ == "__main__":
    main(sys.argv[1], *(int(word) for word in sys.argv[2:3]))
