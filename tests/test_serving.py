"""The server, by OpenAI's own client and by hand: both APIs, streams, refusals, clients that leave, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import random
import re
import socket
import struct
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import openai
import pytest
from pydantic import ValidationError
from serving_cases import DEADLINE_S, Gate, eventually, is_clean, make_engine

from specdec import Engine, PagedModel, SamplingParams
from specdec.async_engine import AsyncEngine
from specdec.serving import Server, bodies, create_app
from specdec.serving.requests import ChatRequest, CompletionRequest, seed_of
from specdec.serving.server import address, bind

MODEL = "tiny"
MESSAGES = [{"role": "system", "content": "be"}, {"role": "user", "content": "abcabc"}]
OURS = {"ignore_eos": True, "return_token_ids": True}


class ReadyServer(Server):
    """Says when it serves."""

    def __init__(self, *args, **options) -> None:  # type: ignore[no-untyped-def]
        super().__init__(*args, **options)
        self.ready = threading.Event()

    async def startup(self, sockets=None) -> None:  # type: ignore[no-untyped-def]
        await super().startup(sockets)
        self.ready.set()


@dataclass
class Served:
    """An engine behind a server on a port of its own, and OpenAI's client."""

    engine: Engine
    front: AsyncEngine
    server: ReadyServer
    url: str
    gate: Gate
    client: openai.OpenAI = field(init=False)

    def __post_init__(self) -> None:
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S)

    def post(self, path: str, body: object, headers: dict | None = None) -> tuple[int, dict, dict]:
        """Status, headers and body of an answer to raw bytes, or to an object as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", path, data, {"Content-Type": "application/json"} | (headers or {}))

    def request(self, method: str, path: str, data: bytes | None = None, headers: dict | None = None):  # type: ignore[no-untyped-def]
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=DEADLINE_S)
        with contextlib.closing(connection):
            connection.request(method, path, data, headers or {})
            response = connection.getresponse()
            text = response.read().decode()
            is_json = response.headers.get_content_type() == "application/json"
            return response.status, dict(response.headers), json.loads(text) if is_json else text

    def connect(self, body: dict, path: str = "/v1/completions") -> socket.socket:
        """A socket with a request on its way, nothing read yet."""
        host, port = self.url.removeprefix("http://").split(":")
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        raw = socket.create_connection((host, int(port)), timeout=DEADLINE_S)
        raw.sendall(head.encode() + data)
        return raw


@contextlib.contextmanager
def serve(
    target: PagedModel, *, max_waiting: int = 64, drain_s: float = DEADLINE_S, **options: object
) -> Iterator[Served]:
    engine = make_engine(target, **options)
    gate = Gate(engine)
    gate.open()
    front = AsyncEngine(engine, max_waiting=max_waiting)
    defaults = SamplingParams(temperature=1.0, max_new_tokens=16)
    with bind("127.0.0.1", 0) as bound:
        server = ReadyServer(create_app(front, MODEL, defaults), front, drain_s=drain_s)
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        assert server.ready.wait(DEADLINE_S)
        try:
            yield Served(engine, front, server, address(bound), gate)
        finally:
            server.should_exit = True
            gate.open()
            thread.join(DEADLINE_S)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def target(tiny, tokenizer) -> PagedModel:
    return PagedModel(tiny(0, vocab_size=len(tokenizer)), tokenizer, name="target")


@pytest.fixture(scope="module")
def served(target) -> Iterator[Served]:
    with serve(target, max_batch_size=4) as served:
        yield served
        eventually(lambda: served.front.num_open == 0)
        eventually(lambda: is_clean(served.engine))


@pytest.fixture(scope="module")
def alone(target) -> Engine:
    """What every answer is compared with: the same request by itself."""
    return make_engine(target, max_batch_size=1)


def sampling(seed: int, length: int = 16, **others: object) -> SamplingParams:
    return SamplingParams(temperature=1.0, seed=seed, max_new_tokens=length, ignore_eos=True, **others)


def test_completion(served: Served, alone: Engine) -> None:
    expected = alone.generate(["abcabc"], sampling(3))[0]
    answer = served.client.completions.create(model=MODEL, prompt="abcabc", seed=3, max_tokens=16, extra_body=OURS)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (expected.text, "length", None)
    assert choice.token_ids == expected.token_ids and choice.prompt_token_ids == expected.prompt_token_ids
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (6, 16, 22)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-") and answer.model == MODEL
    assert answer.system_fingerprint.startswith("specdec-") and "_torch-" in answer.system_fingerprint


def test_chat(served: Served, alone: Engine) -> None:
    expected = alone.generate([MESSAGES], sampling(4), chat=True)[0]
    answer = served.client.chat.completions.create(
        model=MODEL, messages=MESSAGES, seed=4, max_completion_tokens=16, extra_body=OURS
    )
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (expected.text, "assistant", "length")
    assert answer.object == "chat.completion" and answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    # The client's own message goes back in as it came out; content may come in parts.
    again = [
        *MESSAGES,
        choice.message,
        {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]},
    ]
    turns = [*MESSAGES, {"role": "assistant", "content": expected.text}, {"role": "user", "content": "xy"}]
    expected = alone.generate([turns], sampling(4), chat=True)[0]
    answer = served.client.chat.completions.create(model=MODEL, messages=again, seed=4, max_tokens=16, extra_body=OURS)
    assert answer.choices[0].message.content == expected.text


def test_developer_is_system(served: Served) -> None:
    def ids(role: str) -> list[int]:
        messages = [{"role": role, "content": "be"}, MESSAGES[1]]
        answer = served.client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1, extra_body=OURS)
        return answer.choices[0].prompt_token_ids

    assert ids("developer") == ids("system")


@pytest.mark.parametrize("prompt", ["ab", ["ab", "cde"], [40, 41], [[40, 41], [50, 51, 52]]])
def test_every_form_of_prompt(served: Served, alone: Engine, prompt) -> None:
    several = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    answer = served.client.completions.create(model=MODEL, prompt=prompt, seed=5, extra_body=OURS)
    results = alone.generate(several, sampling(5))
    assert [choice.index for choice in answer.choices] == list(range(len(several)))
    assert [choice.token_ids for choice in answer.choices] == [result.token_ids for result in results]
    assert answer.usage.prompt_tokens == sum(len(result.prompt_token_ids) for result in results)


def test_streamed_completion(served: Served, alone: Engine) -> None:
    expected = alone.generate(["abcabc"], sampling(6))[0]
    options = {"model": MODEL, "prompt": "abcabc", "seed": 6, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = served.client.completions.create(**options, extra_body=OURS)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text
    assert [token for chunk in chunks for token in chunk.choices[0].token_ids] == expected.token_ids
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert last.choices == [] and last.usage.completion_tokens == 16 and last.usage.prompt_tokens == 6
    assert all(chunk.usage is None for chunk in chunks) and len({chunk.id for chunk in [*chunks, last]}) == 1


def test_streamed_chat(served: Served, alone: Engine) -> None:
    expected = alone.generate([MESSAGES], sampling(7), chat=True)[0]
    chunks = list(
        served.client.chat.completions.create(
            model=MODEL, messages=MESSAGES, seed=7, stream=True, extra_body={"ignore_eos": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert chunks[-1].choices[0].finish_reason == "length" and chunks[-1].usage is None
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_events_are_lines_of_data_and_end_with_done(served: Served) -> None:
    body = {"model": MODEL, "prompt": "ab", "stream": True, "max_tokens": 2}
    status, headers, text = served.post("/v1/completions", body)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    *events, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "") and all(event.startswith("data: {") for event in events)
    assert all("usage" not in json.loads(event.removeprefix("data: ")) for event in events)


def test_many_at_once_get_what_they_get_alone(served: Served, alone: Engine) -> None:
    prompts = ["ab" * (1 + i % 5) for i in range(20)]
    expected = [alone.generate([prompt], sampling(i))[0].token_ids for i, prompt in enumerate(prompts)]

    async def main() -> list[list[int]]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:

            async def one(i: int) -> list[int]:
                options = {"model": MODEL, "prompt": prompts[i], "seed": i, "max_tokens": 16, "extra_body": OURS}
                if i % 2:
                    return (await client.completions.create(**options)).choices[0].token_ids
                chunks = await client.completions.create(**options, stream=True)
                return [token async for chunk in chunks for token in chunk.choices[0].token_ids]

            return await asyncio.gather(*(one(i) for i in range(20)))

    assert asyncio.run(main()) == expected


def test_samples_have_seeds_of_their_own(served: Served, alone: Engine) -> None:
    answer = served.client.completions.create(model=MODEL, prompt=["ab", "cd"], n=3, seed=8, extra_body=OURS)
    seeds = [seed_of(8, sample) for sample in range(3)]
    assert seeds[0] == 8 and len({*seeds}) == 3 and all(0 <= seed < 2**63 for seed in seeds)
    cases = [(prompt, seed) for prompt in ("ab", "cd") for seed in seeds]
    assert [choice.index for choice in answer.choices] == list(range(6))
    for choice, (prompt, seed) in zip(answer.choices, cases, strict=True):
        assert choice.token_ids == alone.generate([prompt], sampling(seed))[0].token_ids
    # A prompt counts once, however many samples it has.
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 6 * 16)
    streamed = served.client.chat.completions.create(
        model=MODEL, messages=MESSAGES, n=3, seed=8, stream=True, extra_body=OURS
    )
    ids: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for chunk in streamed:
        ids[chunk.choices[0].index] += getattr(chunk.choices[0], "token_ids", [])
    for i, seed in enumerate(seeds):
        assert ids[i] == alone.generate([MESSAGES], sampling(seed), chat=True)[0].token_ids


def test_without_a_seed_every_sample_differs(served: Served) -> None:
    answer = served.client.completions.create(model=MODEL, prompt="ab", n=4, extra_body=OURS)
    assert len({tuple(choice.token_ids) for choice in answer.choices}) == 4


def test_stop_strings_end_text_and_stream_before_them(served: Served, alone: Engine) -> None:
    whole = alone.generate(["abcabc"], sampling(9, 40))[0].text
    cut = next(whole[at : at + 2] for at in range(4, 30) if "\ufffd" not in whole[at : at + 2])
    before = whole[: whole.index(cut)]
    options = {"model": MODEL, "prompt": "abcabc", "seed": 9, "max_tokens": 40, "extra_body": OURS}
    for stop in (cut, ["never", cut], ["never"] * 63 + [cut]):
        answer = served.client.completions.create(**options, stop=stop)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (before, "stop")
        chunks = list(served.client.completions.create(**options, stop=stop, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == before
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_every_parameter_arrives(served: Served, alone: Engine) -> None:
    others = {"top_p": 0.9, "presence_penalty": 0.4, "frequency_penalty": 0.3}
    ours = {"top_k": 50, "min_p": 0.001, "repetition_penalty": 1.2, "stop_token_ids": [200]}
    expected = alone.generate(
        ["abcabc"],
        SamplingParams(
            **{**others, **ours, "stop_token_ids": (200,)},
            temperature=1.3,
            seed=10,
            max_new_tokens=30,
            ignore_eos=True,
            logit_bias={70: 3.0, 71: -100.0},
        ),
    )[0]
    answer = served.client.completions.create(
        model=MODEL,
        prompt="abcabc",
        temperature=1.3,
        seed=10,
        max_tokens=30,
        logit_bias={"70": 3, "71": -100},
        **others,
        extra_body={**OURS, **ours},
    )
    assert answer.choices[0].token_ids == expected.token_ids
    greedy = served.client.completions.create(model=MODEL, prompt="ab", temperature=0, extra_body=OURS)
    expected = alone.generate(["ab"], SamplingParams(max_new_tokens=16, ignore_eos=True))[0]
    assert greedy.choices[0].token_ids == expected.token_ids
    # Null is as good as nothing; what changes nothing is taken as it comes.
    same = {"model": MODEL, "prompt": "ab", "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    same |= {"seed": None, "suffix": None, "user": "me", "best_of": 1, "top_k": -1}
    answer = served.post("/v1/completions", same)[2]
    assert answer["choices"][0]["token_ids"] == expected.token_ids


def test_logprobs_of_completions(served: Served, alone: Engine) -> None:
    expected = alone.generate(["abcabc"], sampling(11, logprobs=3))[0]
    options = {"model": MODEL, "prompt": "abcabc", "seed": 11, "logprobs": 3, "extra_body": OURS}
    found = served.client.completions.create(**options).choices[0].logprobs
    texts = served.server.config.app.state.service.texts
    tokens = [texts.text(token) for token in expected.token_ids]
    assert found.tokens == tokens
    assert found.token_logprobs == pytest.approx([value for value, _ in expected.logprobs])
    assert found.text_offset == [sum(map(len, tokens[:i])) for i in range(16)]
    for top, token, value, (_, best) in zip(
        found.top_logprobs, tokens, found.token_logprobs, expected.logprobs, strict=True
    ):
        assert top == pytest.approx({texts.text(one): one_value for one, one_value in best.items()} | {token: value})
    chunks = list(served.client.completions.create(**options, stream=True))
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        streamed = [value for chunk in chunks for value in getattr(chunk.choices[0].logprobs, name)]
        assert streamed == getattr(found, name)
    bare = served.client.completions.create(**{**options, "logprobs": 0}).choices[0].logprobs
    assert [list(top) for top in bare.top_logprobs] == [[token] for token in tokens]


def test_logprobs_of_chats(served: Served, alone: Engine) -> None:
    expected = alone.generate([MESSAGES], sampling(12, logprobs=2), chat=True)[0]
    options = {"model": MODEL, "messages": MESSAGES, "seed": 12, "logprobs": True, "extra_body": OURS}
    content = served.client.chat.completions.create(**options, top_logprobs=2).choices[0].logprobs.content
    assert [one.logprob for one in content] == pytest.approx([value for value, _ in expected.logprobs])
    for one, (_, best) in zip(content, expected.logprobs, strict=True):
        assert [top.logprob for top in one.top_logprobs] == pytest.approx(list(best.values()))
    # Joined, the bytes are the text, also where a token is no whole character.
    assert bytes(byte for one in content for byte in one.bytes).decode(errors="replace") == expected.text
    assert any(one.token.startswith("bytes:\\x") for one in content)
    chunks = served.client.chat.completions.create(**options, top_logprobs=2, stream=True)
    streamed = [one for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    assert streamed == content
    bare = served.client.chat.completions.create(**options).choices[0].logprobs.content
    assert [one.top_logprobs for one in bare] == [[]] * 16


def test_echo(served: Served) -> None:
    options = {"model": MODEL, "seed": 13, "n": 2, "extra_body": {"ignore_eos": True}}
    for prompt, text in (("ab", "ab"), ([68, 69], served.engine.target.tokenizer.decode([68, 69]))):
        bare = served.client.completions.create(**options, prompt=prompt)
        echoed = served.client.completions.create(**options, prompt=prompt, echo=True)
        assert [one.text for one in echoed.choices] == [text + one.text for one in bare.choices]
        streamed = ["", ""]
        for chunk in served.client.completions.create(**options, prompt=prompt, echo=True, stream=True):
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        assert streamed == [one.text for one in echoed.choices]


def test_models(served: Served) -> None:
    (model,) = served.client.models.list().data
    assert (model.id, model.object, model.max_model_len) == (MODEL, "model", 256)
    assert served.client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="'other' is not served here: use 'tiny'"):
        served.client.models.retrieve("other")


COMPLETION = {"model": MODEL, "prompt": "ab"}
CHAT = {"model": MODEL, "messages": MESSAGES}


@pytest.mark.parametrize(
    ("base", "wrong", "param", "parts"),
    [
        (COMPLETION, {"temperature": -1}, "temperature", ["temperature=-1", ">"]),
        (COMPLETION, {"temperature": "hot"}, "temperature", ["temperature='hot'", "number"]),
        (COMPLETION, {"top_p": 0}, "top_p", ["top_p=0", "(0, 1]"]),
        (COMPLETION, {"max_tokens": 0}, "max_tokens", ["max_tokens=0", "1"]),
        (COMPLETION, {"max_tokens": 2.5}, "max_tokens", ["max_tokens=2.5", "integer"]),
        (COMPLETION, {"max_tokens": True}, "max_tokens", ["max_tokens=True", "integer"]),
        (COMPLETION, {"n": 0}, "n", ["n=0"]),
        (COMPLETION, {"n": 100}, None, ["100 prompts at once", "68"]),
        (COMPLETION, {"seed": 2**63}, "seed", [str(2**63)]),
        (COMPLETION, {"stop": [1]}, "stop", ["non-empty text"]),
        (COMPLETION, {"stop": ""}, "stop", ["non-empty text"]),
        (COMPLETION, {"stop": ["x"] * 65}, "stop", ["65 stop strings", "64"]),
        (COMPLETION, {"logit_bias": {"a": 1}}, "logit_bias", ['{"token id": number, ...}']),
        (COMPLETION, {"logit_bias": {"9999": 1}}, None, ["9999", "vocabulary"]),
        (COMPLETION, {"logprobs": 21}, "logprobs", ["logprobs=21", "20"]),
        (COMPLETION, {"logprobs": 1, "echo": True}, "echo", ["leave one of them out"]),
        (COMPLETION, {"prompt": []}, "prompt", ["list of token ids"]),
        (COMPLETION, {"prompt": ["ab", 3]}, "prompt", ["list of token ids"]),
        (COMPLETION, {"prompt": {"a": 1}}, "prompt", ["list of token ids"]),
        (COMPLETION, {"prompt": None}, "prompt", ["prompt is missing"]),
        (COMPLETION, {"prompt": ""}, None, ["no tokens"]),
        (COMPLETION, {"prompt": [1, 9999]}, None, ["9999", "vocabulary of 259"]),
        (COMPLETION, {"prompt": [-1], "echo": True}, None, ["-1", "vocabulary of 259"]),
        (COMPLETION, {"prompt": [[40], [2**32]], "echo": True}, None, [str(2**32), "vocabulary of 259"]),
        (COMPLETION, {"prompt": [[1]] * 65_537}, "prompt", ["65537 prompts", "65536"]),
        (COMPLETION, {"prompt": "\ud800"}, "prompt", ["give a text"]),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", ["give a text"]),
        (COMPLETION, {"best_of": 3}, "best_of", ["best_of=3", "leave it out, or give 1"]),
        (COMPLETION, {"suffix": "x"}, "suffix", ["suffix='x'", "leave it out"]),
        (COMPLETION, {"temprature": 1}, "temprature", ["'temprature'", "did you mean temperature?"]),
        (COMPLETION, {"stream_options": {"include_usage": True}}, "stream_options", ["stream=true"]),
        (COMPLETION, {"model": None}, "model", ["model is missing"]),
        (CHAT, {"messages": []}, "messages", ["messages=[]", "1"]),
        (CHAT, {"messages": [{"role": "king", "content": "a"}]}, "messages[0].role", ["'king'", "'user'"]),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", ["content is missing"]),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", ["text"]),
        (CHAT, {"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "tool_calls", ["tool_calls=[1]"]),
        (CHAT, {"messages": "hello"}, "messages", ["messages='hello'", "list"]),
        (CHAT, {"tools": [{"type": "function"}]}, "tools", ["not supported", "[]"]),
        (CHAT, {"response_format": {"type": "json_object"}}, "response_format", ["json_object", "{'type': 'text'}"]),
        (CHAT, {"top_logprobs": 2}, "top_logprobs", ["top_logprobs=2", "logprobs=true"]),
        (CHAT, {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", ["max_tokens=1", "give one"]),
        (CHAT, {"prompt": "ab"}, "prompt", ["'prompt'", "messages"]),
    ],
)
def test_a_bad_request_is_told_what_would_be_valid(served: Served, base, wrong, param, parts) -> None:
    path = "/v1/completions" if base is COMPLETION else "/v1/chat/completions"
    for stream in ({},) if "stream_options" in wrong else ({}, {"stream": True}):
        status, _, answer = served.post(path, {**base, **wrong, **stream})
        assert status == 400, answer
        error = answer["error"]
        assert error["type"] == "invalid_request_error" and error["param"] == param
        assert all(part in error["message"] for part in parts), error["message"]


@pytest.mark.parametrize(
    ("data", "headers", "part"),
    [
        (b"", {}, "JSON object"),
        (b"{", {}, "not JSON"),
        (b'{"model": "tiny", "prompt": "ab", "temperature": NaN}', {}, "temperature=nan"),
        (b"[1, 2]", {}, "JSON object"),
        (b"null", {}, "JSON object"),
        (b'"text"', {}, "JSON object"),
        (b"\xff\xfe{}", {}, ""),
        (b"[" * 100_000, {}, ""),
        (b'{"model": "tiny"}', {"Content-Type": "text/plain"}, "application/json"),
    ],
)
def test_a_malformed_body_is_refused(served: Served, data: bytes, headers: dict, part: str) -> None:
    status, _, answer = served.post("/v1/completions", data, headers)
    assert status == 400 and part in answer["error"]["message"], answer


def test_other_refusals_have_the_same_shape(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here: use 'tiny'") as caught:
        served.client.completions.create(model="gpt-4", prompt="ab")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="takes at most 256: shorten the prompt") as caught:
        served.client.completions.create(model=MODEL, prompt="a" * 300)
    assert caught.value.code == "context_length_exceeded"
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)):
        found, _, answer = served.request(method, path)
        assert found == status and path in answer["error"]["message"]
    huge = json.dumps({**COMPLETION, "prompt": "a" * (17 * 1024 * 1024)}).encode()
    status, _, answer = served.post("/v1/completions", huge)
    assert status == 413 and "send less at once" in answer["error"]["message"]


def test_a_large_body_is_read_while_others_are_answered(served: Served, monkeypatch) -> None:
    threads, permitted = [], threading.Event()

    def held(kind: type, data: bytes) -> object:
        threads.append(threading.current_thread().name)
        if len(data) > bodies.SMALL_BYTES:
            assert permitted.wait(DEADLINE_S), "nobody else was answered"
        return parse(kind, data)

    parse = bodies.parse
    monkeypatch.setattr(bodies, "parse", held)
    small = {**COMPLETION, "seed": 16, "max_tokens": 4}
    # Spaces behind the value are JSON, too.
    large = json.dumps(small).encode() + b" " * bodies.SMALL_BYTES
    with ThreadPoolExecutor(2) as pool:
        try:
            answers = [pool.submit(served.post, "/v1/completions", body) for body in (large, large + b"x")]
            eventually(lambda: threads)
            text = served.post("/v1/completions", small)[2]["choices"][0]["text"]
            streamed = list(served.client.completions.create(**small, stream=True))
        finally:
            permitted.set()
        (status, _, answer), (wrong_status, _, wrong) = (one.result() for one in answers)
    assert "".join(chunk.choices[0].text for chunk in streamed) == text
    assert status == 200 and answer["choices"][0]["text"] == text
    assert wrong_status == 400 and "not JSON" in wrong["error"]["message"]
    own = [name for name in threads if name.startswith("specdec-bodies")]
    assert len(own) == 2 and len(threads) == 4


def test_a_client_that_leaves_before_its_body_is_read_is_not_answered(served: Served, monkeypatch) -> None:
    begun, permitted, parse = threading.Event(), threading.Event(), bodies.parse

    def held(kind: type, data: bytes) -> object:
        begun.set()
        assert permitted.wait(DEADLINE_S), "the server did not notice"
        return parse(kind, data)

    def gone() -> float:
        return samples_of(served.request("GET", "/metrics")[2]).get(
            ("specdec_http_responses_total", "/v1/completions", "499"), 0
        )

    monkeypatch.setattr(bodies, "parse", held)
    before, num_requests = gone(), served.engine.metrics.num_requests
    try:
        raw = served.connect({**COMPLETION, "prompt": "a" * bodies.SMALL_BYTES})
        assert begun.wait(DEADLINE_S)
        raw.close()
        eventually(lambda: gone() == before + 1)
    finally:
        permitted.set()
    assert served.engine.metrics.num_requests == num_requests


def test_one_mistake_among_many_is_told() -> None:
    """Millions of them would have to be listed."""
    wrong = [
        (ChatRequest, {**CHAT, "messages": [1, 2]}),
        (CompletionRequest, {**COMPLETION, "stop_token_ids": ["a", "b"]}),
    ]
    for kind, body in wrong:
        with pytest.raises(ValidationError) as caught:
            kind.model_validate(body)
        assert caught.value.error_count() == 1


def test_the_docs_describe_the_bodies(served: Served) -> None:
    status, _, found = served.request("GET", "/openapi.json")
    assert status == 200

    def resolve(place: str) -> dict:
        here = found
        for name in place.removeprefix("#/").split("/"):
            here = here[name.replace("~1", "/")]
        return here

    named = {"/v1/completions": ("prompt", "StreamOptions"), "/v1/chat/completions": ("messages", "Message")}
    for path, (required, other) in named.items():
        schema = found["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert required in schema["required"] and schema["additionalProperties"] is False
        places = re.findall(r'"\$ref": "([^"]+)"', json.dumps(schema))
        assert other in {resolve(place)["title"] for place in places}


def test_too_many_samples_are_refused_before_they_are_made(served: Served) -> None:
    body = {**COMPLETION, "prompt": ["a"] * 20_000, "n": 128, "echo": True}
    tracemalloc.start()
    try:
        status, _, answer = served.post("/v1/completions", body)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert status == 400 and "2560000 prompts at once" in answer["error"]["message"]
    # Less than a pointer for each.
    assert peak_bytes < 8 * 2_560_000


def test_what_never_fits_is_refused(target) -> None:
    with serve(target, max_batch_size=2, num_pages=4) as served:
        with pytest.raises(openai.BadRequestError, match="num_pages") as caught:
            served.client.completions.create(model=MODEL, prompt="ab", max_tokens=200)
        assert caught.value.code == "never_fits"
        assert served.client.completions.create(model=MODEL, prompt="ab", max_tokens=3).usage.completion_tokens <= 3


def test_a_model_without_chat_template_or_tokenizer_says_so(tiny) -> None:
    from conftest import make_tokenizer

    bare = make_tokenizer(with_chat=False)
    with (
        serve(PagedModel(tiny(0, vocab_size=len(bare)), bare)) as served,
        pytest.raises(openai.BadRequestError, match="no chat template: use /v1/completions"),
    ):
        served.client.chat.completions.create(model=MODEL, messages=MESSAGES)
    with serve(PagedModel(tiny(0))) as served:
        answer = served.client.completions.create(model=MODEL, prompt=[40], logprobs=1, max_tokens=2)
        assert answer.choices[0].text == "" and answer.choices[0].logprobs.tokens[0].startswith("token_id:")
        for wrong in ({"prompt": "ab"}, {"prompt": [40], "stop": "x"}, {"prompt": [40], "echo": True}):
            with pytest.raises(openai.BadRequestError, match="tokenizer"):
                served.client.completions.create(model=MODEL, **wrong)


def test_a_full_queue_answers_429(target) -> None:
    with serve(target, max_batch_size=1, max_waiting=2) as served, ThreadPoolExecutor(3) as pool:
        served.gate.close()
        body = {**COMPLETION, "max_tokens": 2}
        waiting = [pool.submit(served.post, "/v1/completions", body) for _ in range(3)]
        eventually(lambda: served.front.num_open == 3)
        status, headers, answer = served.post("/v1/completions", body)
        assert status == 429 and int(headers["retry-after"]) >= 1
        assert answer["error"]["type"] == "rate_limit_error" and "3 is the limit" in answer["error"]["message"]
        served.gate.open()
        assert [one.result()[0] for one in waiting] == [200] * 3
        assert served.post("/v1/completions", body)[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_pages_within_a_step(target, stream: bool) -> None:
    with serve(target, max_batch_size=2) as served:
        served.gate.close()
        raw = served.connect({**COMPLETION, "max_tokens": 200, "ignore_eos": True, "stream": stream})
        served.gate.permit(3)
        eventually(lambda: served.engine.metrics.num_steps == 3 and served.gate.num_held == 1)
        if stream:
            assert raw.recv(12) == b"HTTP/1.1 200"
        raw.close()
        # The step under way cannot be stopped; the server knows before it ends, and no other follows.
        eventually(lambda: served.front._inbox, "the cancellation reaches the engine")
        served.gate.permit()
        eventually(lambda: served.front.num_open == 0)
        assert served.engine.metrics.num_steps == 4 and served.engine.metrics.num_cancelled == 1
        assert is_clean(served.engine)


def test_a_client_that_leaves_the_queue_never_runs(target) -> None:
    with serve(target, max_batch_size=1) as served:
        served.gate.close()
        first = served.connect({**COMPLETION, "max_tokens": 4, "ignore_eos": True})
        served.gate.permit()
        eventually(lambda: served.engine.metrics.num_steps == 1 and served.gate.num_held == 1)
        second = served.connect(COMPLETION)
        eventually(lambda: len(served.front._inbox) == 1)
        second.close()
        eventually(lambda: len(served.front._inbox) == 2)
        served.gate.open()
        assert first.recv(12) == b"HTTP/1.1 200"
        first.close()
        eventually(lambda: served.front.num_open == 0)
        assert served.engine.metrics.num_finished == 1 and is_clean(served.engine)


def test_abrupt_clients_leave_nothing_behind(target, alone: Engine) -> None:
    rng = random.Random(0)
    bodies = [b"", b"{", b"\x00" * 50, b'{"model": "tiny", "prompt": [1, "a"]}', json.dumps({"prompt": "ab"}).encode()]

    def strike(served: Served, number: int) -> None:
        kind = number % 4
        if kind == 0:
            assert served.post("/v1/completions", bodies[number % len(bodies)])[0] == 400
            return
        stream = bool(number % 3)
        path = "/v1/completions" if number % 2 else "/v1/chat/completions"
        own = COMPLETION if number % 2 else CHAT
        raw = served.connect(
            {**own, "max_tokens": 150, "n": 1 + number % 3, "ignore_eos": True, "stream": stream}, path
        )
        if kind == 1:
            # Closed by a reset, not by a farewell.
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif kind == 2 and stream:
            raw.recv(rng.randrange(1, 2000))
        raw.close()

    with serve(target, max_batch_size=3, num_pages=40, max_waiting=200) as served, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: strike(served, number), range(60)))
        options = {"model": MODEL, "prompt": "abcabc", "seed": 14, "extra_body": OURS}
        answer = served.client.completions.create(**options)
        assert answer.choices[0].token_ids == alone.generate(["abcabc"], sampling(14))[0].token_ids
        eventually(lambda: served.front.num_open == 0)
        assert is_clean(served.engine) and served.front.state == "running"
        assert not served.engine.metrics.num_preemptions or served.engine.metrics.num_cancelled


def test_a_failed_step_is_told_and_survived(target) -> None:
    with serve(target, max_batch_size=2) as served:
        verify, failing = served.engine.verifier.verify, threading.Event()

        def broken(*args, **kwargs):  # type: ignore[no-untyped-def]
            if failing.is_set():
                raise RuntimeError("planted")
            return verify(*args, **kwargs)

        served.engine.verifier.verify = broken
        failing.set()
        with pytest.raises(openai.InternalServerError, match="RuntimeError: planted"):
            served.client.completions.create(model=MODEL, prompt="ab")
        with pytest.raises(openai.APIError, match="RuntimeError: planted"):
            list(served.client.completions.create(model=MODEL, prompt="ab", stream=True))
        failing.clear()
        assert served.client.completions.create(model=MODEL, prompt="ab").choices
        assert served.request("GET", "/health")[0] == 200
        failing.set()
        for _ in range(3):
            with pytest.raises(openai.InternalServerError):
                served.client.completions.create(model=MODEL, prompt="ab")
        eventually(lambda: served.front.state == "dead")
        status, _, body = served.request("GET", "/health")
        assert status == 503 and body["status"] == "dead" and "planted" in body["error"]
        status, headers, body = served.post("/v1/completions", COMPLETION)
        assert status == 503 and body["error"]["code"] == "engine_dead" and "retry-after" in headers


def samples_of(text: str) -> dict[tuple[str, ...], float]:
    """The values of Prometheus' text by name and labels."""
    from prometheus_client.parser import text_string_to_metric_families

    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_health_and_metrics(target) -> None:
    with serve(target, max_batch_size=2) as served:
        assert served.request("GET", "/health")[2] == {"status": "running", "open_requests": 0, "error": None}
        served.client.completions.create(model=MODEL, prompt="abcabc", n=2, max_tokens=9, extra_body=OURS)
        served.post("/v1/completions", b"{")
        status, headers, text = served.request("GET", "/metrics")
        assert status == 200 and headers["content-type"].startswith("text/plain")
        samples = samples_of(text)
        assert samples["specdec_output_tokens_total",] == 18 and samples["specdec_requests_open",] == 0
        assert samples["specdec_requests_finished_total", "length"] == 2
        assert samples["specdec_http_responses_total", "/v1/completions", "200"] == 1
        assert samples["specdec_http_responses_total", "/v1/completions", "400"] == 1
        assert samples["specdec_time_to_first_token_seconds_count",] == 2
        assert samples["specdec_inter_token_seconds_count",] <= 16
        assert samples["specdec_prompt_tokens_total",] == 12 and samples["specdec_up",] == 1
        assert samples["specdec_step_seconds_total", "forward"] > 0
        pages = {use: samples["specdec_pages", use] for use in ("running", "prefix", "free")}
        assert pages["running"] == 0 and sum(pages.values()) == served.engine.pool.num_pages


def test_metrics_tell_how_requests_ended_and_how_deep_drafts_were_right(target) -> None:
    with serve(target, max_batch_size=2) as served:
        before = samples_of(served.request("GET", "/metrics")[2])
        assert before["specdec_requests_cancelled_total",] == before["specdec_requests_failed_total",] == 0
        # A greedy text of a tiny model repeats itself, so lookup is right.
        options = {"model": MODEL, "prompt": "abcabc", "temperature": 0, "extra_body": OURS}
        served.client.completions.create(**options, max_tokens=60)
        served.gate.close()
        raw = served.connect({**COMPLETION, "max_tokens": 200, "ignore_eos": True})
        eventually(lambda: served.gate.num_held == 1)
        raw.close()
        eventually(lambda: served.front._inbox, "the cancellation reaches the engine")
        served.gate.open()
        eventually(lambda: served.front.num_open == 0)
        verify = served.engine.verifier.verify

        def broken(*args, **kwargs):  # type: ignore[no-untyped-def]
            served.engine.verifier.verify = verify
            raise RuntimeError("planted")

        served.engine.verifier.verify = broken
        with pytest.raises(openai.InternalServerError, match="planted"):
            served.client.completions.create(**options)
        samples = samples_of(served.request("GET", "/metrics")[2])
        finished = samples["specdec_requests_finished_total", "length"]
        cancelled, failed = (samples[f"specdec_requests_{how}_total",] for how in ("cancelled", "failed"))
        assert (finished, cancelled, failed) == (1, 1, 1)
        for name in ("drafted_by_depth", "accepted_by_depth"):
            found = {key[1]: value for key, value in samples.items() if key[0] == f"specdec_{name}_total"}
            counts = getattr(served.engine.metrics, name)
            assert found == {str(depth): count for depth, count in enumerate(counts, 1)}
        assert samples["specdec_accepted_by_depth_total", "1"] > 0


def test_shutdown_lets_requests_end(target, alone: Engine) -> None:
    with serve(target, max_batch_size=2) as served, ThreadPoolExecutor(2) as pool:
        served.gate.close()
        options = {"model": MODEL, "prompt": "abcabc", "seed": 15, "extra_body": OURS}
        whole = pool.submit(served.client.completions.create, **options)
        stream = pool.submit(lambda: list(served.client.completions.create(**options, stream=True)))
        eventually(lambda: served.front.num_open == 2)
        served.server.should_exit = True
        eventually(lambda: served.front.state == "closing")
        served.gate.open()
        expected = alone.generate(["abcabc"], sampling(15))[0]
        assert whole.result().choices[0].token_ids == expected.token_ids
        assert "".join(chunk.choices[0].text for chunk in stream.result()) == expected.text
    assert served.front.state == "closed" and is_clean(served.engine)


def test_shutdown_ends_what_does_not_end_in_time(target) -> None:
    with serve(target, max_batch_size=2, drain_s=0) as served, ThreadPoolExecutor(2) as pool:
        served.gate.close()
        stream = pool.submit(lambda: list(served.client.completions.create(model=MODEL, prompt="ab", stream=True)))
        whole = pool.submit(served.client.completions.create, model=MODEL, prompt="ab")
        eventually(lambda: served.front.num_open == 2)
        served.gate.permit()
        eventually(lambda: served.engine.metrics.num_steps == 1)
        served.server.should_exit = True
        eventually(lambda: served.front._closing == "cancel")
        served.gate.open()
        with pytest.raises(openai.APIError, match="closed before the request ended"):
            stream.result()
        with pytest.raises(openai.InternalServerError, match="closed before the request ended"):
            whole.result()
    assert served.front.state == "closed" and is_clean(served.engine)
