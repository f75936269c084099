"""How bodies become objects: small ones at once, large ones in a thread of their own, where they hold up nobody's stream."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from specdec.serving.connection import while_connected
from specdec.serving.fields import Body
from specdec.serving.refusals import Refusal, of_validation

B = TypeVar("B", bound=Body)
# What takes a few milliseconds at most.
SMALL_BYTES = 64 * 1024


class BodyReader:
    """Reads the bodies of requests; those of more than SMALL_BYTES bytes are parsed in one thread, one after another."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "specdec-bodies")

    async def read(self, kind: type[B], request: Request) -> B:
        """Raises Refusal for what is no such body, ClientDisconnect where the client goes away before it is one."""
        data = await request.body()
        if not data or not _is_json(request.headers.get("content-type", "")):
            raise Refusal("the body must be a JSON object, sent with Content-Type: application/json")
        if len(data) <= SMALL_BYTES:
            return parse(kind, data)
        parsing = asyncio.get_running_loop().run_in_executor(self._thread, parse, kind, data)
        return await while_connected(request.receive, parsing)

    def close(self) -> None:
        """Nothing large is read any more."""
        self._thread.shutdown(wait=False)


def parse(kind: type[B], data: bytes) -> B:
    """The body that is written in JSON. Raises Refusal for the first thing that is wrong with it."""
    try:
        return kind.model_validate(json.loads(data))
    except ValidationError as error:
        raise of_validation(error) from None
    except json.JSONDecodeError as error:
        raise Refusal(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError) as error:
        # No text in UTF-8, numbers of thousands of digits, lists in lists in lists.
        raise Refusal(f"the body is not JSON: {error}") from None


def described(path: str, kind: type[Body]) -> dict[str, Any]:
    """What the server's `/docs` say of the body of POST `path`, which the route reads by itself."""
    place = f"#/paths/{path.replace('/', '~1')}/post/requestBody/content/application~1json/schema"
    schema = kind.model_json_schema(ref_template=f"{place}/$defs/{{model}}")
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _is_json(content_type: str) -> bool:
    kind, _, subtype = content_type.partition(";")[0].strip().lower().partition("/")
    return kind == "application" and (subtype == "json" or subtype.endswith("+json"))
