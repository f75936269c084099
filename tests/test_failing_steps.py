"""Steps that fail, wherever they do: what was in them is gone with its pages, and the others say what they say alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest

import pytest
from serving_cases import is_clean

from specdec import Engine, PagedModel, SamplingParams
from specdec.drafters import SmallModelDrafter, TopK
from specdec.handle import Handle
from specdec.request import Request
from specdec.verifiers import Verifier

# The first two begin alike and share pages; the third has a long prompt, which waits for its share of the budget.
PROMPTS = [list(range(10, 23)), [*range(10, 20), 40, 41], list(range(20, 80)), [50, 51] * 4, [60]]
BATCH = 3


def params(index: int, length: int = 14) -> SamplingParams:
    return SamplingParams(temperature=1.0, seed=index, max_new_tokens=length, ignore_eos=True, logprobs=2)


def make_engine(tiny, batch: int) -> Engine:  # type: ignore[no-untyped-def]
    target, draft = PagedModel(tiny(0)), PagedModel(tiny(0, noise=0.02))
    drafter = SmallModelDrafter(draft)
    return Engine(Verifier(target), drafter, TopK(8, 4, 2), max_batch_size=batch, prefill_chunk=8, page_size=4)


@pytest.fixture(scope="module")
def alone(tiny) -> list[list[int]]:  # type: ignore[no-untyped-def]
    engine = make_engine(tiny, 1)
    return [engine.generate([prompt], params(i))[0].token_ids for i, prompt in enumerate(PROMPTS)]


class Planted(Exception):
    pass


class Fails:
    """Raises in the `at`-th call of `owner.name` from now on, before or after the call itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, at: int, *, after: bool) -> None:
        self._call, self._left, self._after = getattr(owner, name), at, after
        if isinstance(owner, type):
            monkeypatch.setattr(owner, name, lambda *args, **options: self(*args, **options))
        else:
            monkeypatch.setattr(owner, name, self)

    def __call__(self, *args, **options):  # type: ignore[no-untyped-def]
        self._left -= 1
        if self._left == 0 and not self._after:
            raise Planted
        out = self._call(*args, **options)
        if self._left == 0:
            raise Planted
        return out


Place = Callable[[Engine], tuple[object, str, int, bool]]
# Owner, method, the call of it that fails, and whether it has done its work by then.
PLACES: dict[str, Place] = {
    "plan": lambda engine: (engine._scheduler, "plan", 1, True),
    "admit": lambda engine: (engine.prefixes, "announce", 1, False),
    "propose": lambda engine: (engine.drafter, "propose", 1, True),
    "amid a draft": lambda engine: (engine.drafter.model, "forward", 2, True),
    "forward": lambda engine: (engine.target, "forward", 1, True),
    "commit": lambda engine: (engine.cache, "move", 1, True),
    "verify": lambda engine: (engine.verifier, "verify", 1, True),
    "first emission": lambda engine: (Request, "append", 1, True),
    "amid emissions": lambda engine: (Request, "append", 2, False),
    "emit": lambda engine: (engine, "_emit", 1, True),
    "before observe": lambda engine: (engine.drafter, "observe", 1, False),
    "observe": lambda engine: (engine.drafter, "observe", 1, True),
    "settle": lambda engine: (engine._scheduler, "settle", 1, True),
    "amid settling": lambda engine: (engine.prefixes, "extend", 2, False),
}


def run_until(engine: Engine, handles: list[Handle]) -> None:
    while not all(handle.is_done for handle in handles):
        engine.step()
        engine.check()


@pytest.mark.parametrize("steps_before", [1, 6])
@pytest.mark.parametrize("place", PLACES)
def test_what_was_in_the_step_is_gone_and_the_others_go_on(tiny, alone, monkeypatch, place, steps_before) -> None:
    engine = make_engine(tiny, BATCH)
    handles = [engine.submit(prompt, params(i), index=i) for i, prompt in enumerate(PROMPTS)]
    for _ in range(steps_before):
        engine.step()
    if place == "admit":
        # A place for one more, so that the next step begins it.
        engine.cancel(next(one for one in handles if not one.is_done))
    ended: set[int] = set()
    with monkeypatch.context() as patch:
        owner, name, at, after = PLACES[place](engine)
        Fails(patch, owner, name, at, after=after)
        with pytest.raises(Planted):
            for _ in range(20):
                ended = {handle.index for handle in handles if handle.is_done}
                engine.step()
    engine.check()
    gone = {handle.index for handle in handles if handle.is_done} - ended
    assert gone and gone.isdisjoint(request.index for request in engine.running)
    for handle in (handles[index] for index in gone):
        assert handle.result.finish_reason in ("failed", "length") and not handle.request.sequence.table.pages
        # What it had come to say before is right.
        assert handle.result.token_ids == alone[handle.index][: len(handle.result.token_ids)]
    again = [engine.submit(PROMPTS[index], params(index), index=index) for index in gone]
    run_until(engine, handles + again)
    untouched = [
        handle for handle in handles if handle.index not in gone and handle.result.finish_reason != "cancelled"
    ]
    for handle in (*again, *untouched):
        assert handle.result.token_ids == alone[handle.index]
    assert is_clean(engine)
    metrics = engine.metrics
    assert metrics.num_requests == metrics.num_finished + metrics.num_cancelled + metrics.num_failed
    # Each request's trees count once, however it ended.
    for name in ("drafted_by_depth", "accepted_by_depth"):
        own = [getattr(handle.metrics, name) for handle in (*handles, *again)]
        assert getattr(metrics, name) == [sum(place) for place in zip_longest(*own, fillvalue=0)] != []


@pytest.mark.parametrize("place", ["first emission", "emit", "before observe", "observe"])
def test_one_that_ended_in_the_failing_step_holds_nothing(tiny, alone, monkeypatch, place: str) -> None:
    """The request of one token ends in its first step; it is done, and all that it said is there."""
    engine = make_engine(tiny, BATCH)
    short, long = engine.submit(PROMPTS[4], params(4, 1)), engine.submit(PROMPTS[3], params(3))
    with monkeypatch.context() as patch:
        owner, name, at, after = PLACES[place](engine)
        Fails(patch, owner, name, at, after=after)
        with pytest.raises(Planted):
            engine.step()
    assert engine.is_idle and is_clean(engine)
    assert short.result.finish_reason == "length" and short.result.token_ids == alone[4][:1]
    assert long.result.finish_reason == "failed"
    assert list(short) == short.request.tokens
    engine.cancel(short)
    assert engine.metrics.num_cancelled == 0
