"""Prompts of an experiment: where they come from and how they are wrapped."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

# How a prompt becomes the user's message. Any text that holds {prompt} is a template, too.
TEMPLATES = {
    "none": "{prompt}",
    "code": "Complete this function:\n```python\n{prompt}\n```",
}
FIELDS = ("prompt", "question")


def read_prompts(path: str, field: str | None = None, limit: int | None = None) -> list[str]:
    """The first `limit` prompts of a file: one JSON object per line (.jsonl) or one prompt per line (.txt).

    `field` names the object's key (None: `prompt`, else `question`). Raises ValueError naming file and line.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be >= 1")
    file = Path(path)
    if file.suffix not in (".jsonl", ".txt"):
        raise ValueError(f"prompt_file={path} must end in .jsonl or .txt")
    if not file.is_file():
        raise ValueError(f"prompt_file={path}: no such file")
    lines = _read(file, f"prompt_file={path}").split("\n")
    numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()][:limit]
    if not numbered:
        raise ValueError(f"prompt_file={path} holds no prompts")
    if file.suffix == ".txt":
        return [line.rstrip("\r") for _, line in numbered]
    return [_prompt_of(line, field, f"{path}, line {i}") for i, line in numbered]


def read_documents(path: str, field: str) -> list[str]:
    """The documents of a file: `field` of each line of a .jsonl, any other file as a whole. Raises ValueError."""
    text = _read(Path(path), path)
    if not path.endswith(".jsonl"):
        return [text] if text.strip() else []
    return [_prompt_of(line, field, f"{path}, line {i}") for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def wrap(prompts: list[str], template: str) -> list[str]:
    """Each prompt inside the template: a name of `TEMPLATES`, or a text that holds {prompt}."""
    text = TEMPLATES.get(template, template)
    if "{prompt}" not in text:
        names = ", ".join(TEMPLATES)
        raise ValueError(f"template={template!r} must be one of {names}, or a text that holds {{prompt}}")
    return [text.replace("{prompt}", prompt) for prompt in prompts]


def check_chat(chat: str) -> str:
    """`auto`, `true` or `false`, however it was spelt. Raises ValueError otherwise."""
    if chat.lower() not in ("auto", "true", "false"):
        raise ValueError(f"chat={chat} must be auto, true or false")
    return chat.lower()


def uses_chat(chat: str, tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether prompts go through the chat template; `auto`: where the tokenizer has one."""
    if check_chat(chat) == "auto":
        return bool(getattr(tokenizer, "chat_template", None))
    return chat.lower() == "true"


def _read(file: Path, name: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _prompt_of(line: str, field: str | None, place: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place} is not a JSON object")
    for name in (field,) if field is not None else FIELDS:
        if name in row:
            if not isinstance(row[name], str):
                raise ValueError(f"{place}: {name} is not a text but {row[name]!r}")
            return row[name]
    wanted = field if field is not None else " or ".join(FIELDS)
    raise ValueError(f"{place} has no field {wanted}; choose with prompt_field= one of {', '.join(row)}")
