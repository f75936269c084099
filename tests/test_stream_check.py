"""The check of random streams: what is drawn, what counts as the same text, and that a wrong text is found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from interruption import interrupted_after

from specdec import PagedModel, SamplingParams, cli
from specdec.config import EngineConfig
from specdec.drafters import NGramDrafter, TopK
from specdec.experiments import stream_check
from specdec.experiments.streams import StreamResult, differing, draw_stream, run_stream
from specdec.experiments.system import System
from specdec.experiments.workload import LoadRequest
from specdec.request import Request
from specdec.verifiers import Follow

REQUESTS = [
    LoadRequest(i, "set", [3 + (i + j) % 7 for j in range(6 + 5 * i)], SamplingParams(max_new_tokens=5 + i, seed=i))
    for i in range(6)
]


def test_streams_are_drawn_from_their_seed_and_their_number() -> None:
    drawn = [draw_stream(REQUESTS, [0.0, 0.7], 0.5, 8, seed=1, number=number) for number in range(30)]
    assert drawn[3] == draw_stream(REQUESTS, [0.0, 0.7], 0.5, 8, seed=1, number=3)
    assert len({(one.engine.page_size, one.engine.num_pages) for one in drawn}) > 10
    assert {one.engine.share_prefixes for one in drawn} == {True, False}
    assert {request.params.temperature for one in drawn for request in one.requests} == {0.0, 0.7}
    cancelled = [after for one in drawn for after in one.cancel_after]
    assert 0.3 < sum(after is not None for after in cancelled) / len(cancelled) < 0.7
    # The longest request fits every pool: 31 tokens of prompt, 10 new ones, 8 slots for a tree.
    assert all(one.engine.num_pages * one.engine.page_size >= 31 + 10 + 8 for one in drawn)


def test_a_cancelled_request_must_have_said_the_beginning() -> None:
    result = StreamResult(
        {"0": [1, 2, 3], "1": [1, 2], "2": [], "3": [4], "4": [7]},
        {"0": "abc", "1": "ab", "2": "", "3": "d", "4": "x"},
        {"0": "length", "1": "cancelled", "2": "cancelled", "3": "cancelled", "4": "stop"},
        *(0, 0, 0),
    )
    alone = {"0": ([1, 2, 3], "abc"), "1": ([1, 2, 3], "abc"), "2": ([1], "a"), "3": ([1, 4], "ad"), "4": ([7], "y")}
    assert differing(result, alone) == ["3", "4"]


@pytest.fixture(scope="module")
def target(tiny) -> PagedModel:
    return PagedModel(tiny())


@pytest.mark.parametrize("number", range(3))
def test_a_stream_says_what_its_requests_say_alone(number: int, target: PagedModel) -> None:
    drafting = System(NGramDrafter(), TopK(total=8, depth=3, k=2), Follow(), {})
    stream = draw_stream(REQUESTS, [0.0, 0.8], 0.3, 8, seed=2, number=number)
    # Together they need more pages than there are.
    least = -(-(31 + 10 + 8) // stream.engine.page_size)
    sizes = replace(stream.engine, num_pages=least, max_batch_size=4)
    stream = replace(stream, engine=sizes, gaps=[0] * len(REQUESTS), cancel_after=[None, None, 3, None, 0, None])
    result = run_stream(drafting.engine(target, stream.engine), stream)
    alone = System(None, None, Follow(), {}).engine(target, EngineConfig(max_batch_size=1))
    found = {
        str(one.index): (done.token_ids, done.text)
        for one in stream.requests
        for done in alone.generate([one.prompt], one.params)
    }
    assert differing(result, found) == []
    assert result.finish_reasons["2"] == result.finish_reasons["4"] == "cancelled"


@pytest.fixture
def words(tiny, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    tiny(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained("target")
    tokenizer.save_pretrained("target")
    Path("a.txt").write_text("abcabcabc\nxyzxyz\nhello world, hello\n")
    return [
        *("stream_check", "target=hf", "target.path=target", "prompt_file=a.txt", "output=rows.jsonl", "work_dir=work"),
        *("num_requests=9", "stream_length=3", "output_length.high=8", "prompt_length.high=40", "prefix_tokens=17"),
    ]


def test_the_check_writes_a_row_and_goes_on_where_it_was(words, capfd, monkeypatch) -> None:
    kept = 6
    with interrupted_after(kept, monkeypatch):
        assert cli.main(words) == 130
    assert "go on with work_dir=work" in capfd.readouterr().err
    assert cli.main(words) == 0
    (row,) = [json.loads(text) for text in Path("rows.jsonl").read_text().splitlines()]
    assert (
        row["num_requests"] == 9 and row["num_streams"] == 3 and row["passed"] and row["resumed_measurements"] == kept
    )
    assert sum(row["finish_reasons"].values()) == 9 and row["num_differing"] == 0 and len(row["systems"]) == 3
    assert row["dtype"] == "float32" and row["command"].startswith("specdec stream_check ")
    assert "0 differ" in capfd.readouterr().out


def test_a_wrong_text_fails_the_check(words, capfd, monkeypatch) -> None:
    append = Request.append

    def wrong(self: Request, tokens: list[int], logprobs):  # type: ignore[no-untyped-def]
        # A mistake that company alone brings out: the run alone does not have it.
        shifted = [token ^ 1 for token in tokens] if self.index == 3 else tokens
        return append(self, shifted, logprobs)

    run = stream_check.run_stream

    def mistaken(engine, stream, on_step):  # type: ignore[no-untyped-def]
        with monkeypatch.context() as patch:
            patch.setattr(Request, "append", wrong)
            return run(engine, stream, on_step)

    monkeypatch.setattr(stream_check, "run_stream", mistaken)
    assert cli.main([*words, "cancel_share=0"]) == 1
    row = json.loads(Path("rows.jsonl").read_text())
    assert not row["passed"] and row["num_differing"] > 0 and row["differing"][0].startswith("3: ")


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        ("num_requests=0", ["num_requests=0"]),
        ("cancel_share=2", ["cancel_share=2"]),
        ("temperatures=[-1]", ["temperature=-1"]),
        (
            "systems=['drafter=ngram drafter/policy=chain rule=rejection']",
            ["rule=rejection", "follow", "temperatures=[0]"],
        ),
        ("systems=['drafter=ngrm']", ["drafter=ngrm"]),
    ],
)
def test_an_error_names_the_value(extra, parts, words, capfd, monkeypatch) -> None:
    monkeypatch.setattr(stream_check, "load_target", lambda config: pytest.fail("the model was loaded"))
    assert cli.main([*words, extra]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and all(part in err for part in parts), err
