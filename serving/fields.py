"""What the fields of a body may hold, and bodies that are checked strictly: their messages say what would be valid."""

from __future__ import annotations

import difflib
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from specdec.serving.refusals import Refusal

# Every token's text is searched for all of them; OpenAI takes 4.
MAX_STOP_STRINGS = 64
# Whatever the engine takes at once is less; looking at millions of them one by one would hold up everybody.
MAX_PROMPTS = 65_536


def _refuse(message: str) -> PydanticCustomError:
    # Braces in a message would be read as placeholders.
    return PydanticCustomError("refused", "{message}", {"message": message})


def _is_text(value: object) -> bool:
    """Whether it is a string of whole characters; JSON can spell halves of them, which no tokenizer takes."""
    if not isinstance(value, str):
        return False
    try:
        # Much quicker than looking at each.
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_prompt(value: object) -> object:
    def ids(one: object) -> bool:
        return isinstance(one, list) and bool(one) and all(type(token) is int for token in one)

    if isinstance(value, list) and len(value) > MAX_PROMPTS and not isinstance(value[0], int):
        raise _refuse(f"{len(value)} prompts are more than {MAX_PROMPTS}: split them")
    if _is_text(value) or ids(value):
        return value
    if isinstance(value, list) and value and (all(map(_is_text, value)) or all(map(ids, value))):
        return value
    raise _refuse(
        "give a text, a list of texts, a list of token ids or a list of lists of token ids, none of them empty"
    )


def check_stop(value: object) -> object:
    several = [value] if isinstance(value, str) else value
    if isinstance(several, list) and len(several) > MAX_STOP_STRINGS:
        raise _refuse(f"{len(several)} stop strings are more than {MAX_STOP_STRINGS}: give fewer")
    if isinstance(several, list) and all(_is_text(one) and one for one in several):
        return several
    raise _refuse("give a non-empty text or a list of them")


def check_content(value: object) -> object:
    if _is_text(value):
        return value
    parts: list[Any] = value if isinstance(value, list) else [value]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not _is_text(part.get("text")):
            raise _refuse('give a text, or a list of {"type": "text", "text": ...}: this server reads text alone')
    return "".join(part["text"] for part in parts)


def check_bias(value: object) -> object:
    def is_id(key: object) -> bool:
        return isinstance(key, str) and key.isascii() and key.isdigit()

    if isinstance(value, dict) and all(is_id(key) and type(bias) in (int, float) for key, bias in value.items()):
        return {int(key): float(bias) for key, bias in value.items()}
    raise _refuse('give {"token id": number, ...}')


class Body(BaseModel):
    """A JSON object whose nulls are as good as not given, and whose unknown fields are refused by name."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    # Fields of OpenAI's that change nothing here, and the values with which others ask for nothing.
    ignored: ClassVar[tuple[str, ...]] = ()
    neutral: ClassVar[dict[str, tuple[object, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {key: value for key, value in values.items() if value is not None and key not in cls.ignored}
        for key in given.keys() - cls.model_fields.keys():
            if given[key] in cls.neutral.get(key, ()):
                del given[key]
            elif key in cls.neutral:
                only = " or ".join(map(repr, cls.neutral[key]))
                remedy = f"leave it out{f', or give {only}' if only else ''}"
                raise Refusal(f"{key}={_short(given[key])} is not supported: {remedy}", param=key)
            else:
                near = difflib.get_close_matches(key, cls.model_fields, n=1)
                remedy = (
                    f"did you mean {near[0]}?" if near else f"leave it out, known are {', '.join(cls.model_fields)}"
                )
                raise Refusal(f"parameter {_short(key)} is unknown: {remedy}", param=key)
        return given


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
