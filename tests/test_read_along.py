"""Drafters with a network read long prompts along with the target: in pieces, never more in a step than is due."""

from __future__ import annotations

import pytest
import torch
from head_cases import eagle_config

from specdec import Engine, PagedModel, SamplingParams
from specdec.drafters import EagleDrafter, NGramDrafter, Sampled, SmallModelDrafter, UnionDrafter
from specdec.drafters.eagle import _EagleRound
from specdec.drafters.heads import EagleHead
from specdec.drafters.levels import LevelDrafter
from specdec.drafters.small_model import _ModelRound
from specdec.tree import TokenTree
from specdec.verifiers import RULES, Verifier

CHUNK, BATCH, POLICY = 16, 3, Sampled([2, 1, 1])
LONG = [list(range(10, 90)), [*range(10, 60), 91, 92, *range(20, 40)], [7] * 37, list(range(60, 80)), [5, 6]]


@pytest.fixture(scope="module")
def target(tiny) -> PagedModel:  # type: ignore[no-untyped-def]
    return PagedModel(tiny(0), name="target")


def drafter_of(name: str, tiny, target: PagedModel) -> LevelDrafter | UnionDrafter:  # type: ignore[no-untyped-def]
    if name == "union":
        return UnionDrafter([NGramDrafter(), drafter_of("eagle_3", tiny, target)])
    if name == "small_model":
        return SmallModelDrafter(PagedModel(tiny(0, noise=0.02)))
    torch.manual_seed(3)
    return EagleDrafter(EagleHead(eagle_config(target, int(name[-1]))))


def engine_of(target: PagedModel, drafter: LevelDrafter | UnionDrafter, **options: object) -> Engine:
    settings = {"max_batch_size": BATCH, "prefill_chunk": CHUNK, "page_size": 4} | options
    return Engine(Verifier(target, RULES["traversal"]()), drafter, POLICY, **settings)  # type: ignore[arg-type]


def params(count: int, length: int = 12) -> list[SamplingParams]:
    return [SamplingParams(temperature=1.0, seed=i, max_new_tokens=length, ignore_eos=True) for i in range(count)]


class Reading:
    """How many final tokens the network was run on since it was last asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for kind in (_ModelRound, _EagleRound):
            monkeypatch.setattr(kind, "run_chunk", self._counting(kind.run_chunk))

    def _counting(self, run):  # type: ignore[no-untyped-def]
        def counted(draft, segments, spans, rows):  # type: ignore[no-untyped-def]
            self.count += sum(span.end - span.start for span in spans)
            return run(draft, segments, spans, rows)

        return counted

    def take(self) -> int:
        count, self.count = self.count, 0
        return count


@pytest.mark.parametrize("share_prefixes", [True, False])
@pytest.mark.parametrize("name", ["small_model", "eagle_1", "eagle_3"])
def test_no_step_has_more_to_read_than_the_budget(tiny, target, monkeypatch, name: str, share_prefixes: bool) -> None:
    reading = Reading(monkeypatch)
    engine = engine_of(target, drafter_of(name, tiny, target), share_prefixes=share_prefixes)
    handles = [engine.submit(prompt, one) for prompt, one in zip(LONG, params(len(LONG)), strict=True)]
    most = 0
    while not engine.is_idle:
        engine.step()
        engine.check()
        # Beside the budget for prompts, what a step accepts of each sequence is read in the next one.
        most = max(most, reading.take())
        assert most <= CHUNK + BATCH * (POLICY.max_depth + 1)
    assert most >= CHUNK
    # The same rounds and trees as alone, with prompts read whole.
    for handle, prompt, one in zip(handles, LONG, params(len(LONG)), strict=True):
        alone = engine_of(target, drafter_of(name, tiny, target), max_batch_size=1, prefill_chunk=512)
        (expected,) = alone.generate([prompt], one)
        assert handle.result.token_ids == expected.token_ids
        assert handle.result.metrics.drafted_by_depth == expected.metrics.drafted_by_depth
        assert handle.result.metrics.accepted_by_depth == expected.metrics.accepted_by_depth


def test_a_prompt_of_one_chunk_is_read_with_its_root(tiny, target, monkeypatch) -> None:
    reading = Reading(monkeypatch)
    engine = engine_of(target, drafter_of("small_model", tiny, target), prefill_chunk=512)
    engine.submit(LONG[0], params(1)[0])
    engine.step()
    assert reading.take() == 0
    engine.step()
    assert reading.take() == len(LONG[0]) + 1


class Sleeps:
    """Drafts nothing in the first steps, and then what the policy says."""

    def __init__(self, num_steps: int = 1 << 30) -> None:
        self.num_steps = num_steps

    def propose(self, step, drafter, policy, noise) -> TokenTree:  # type: ignore[no-untyped-def]
        self.num_steps -= 1
        if self.num_steps < 0:
            return drafter.propose(step.drafting, policy, noise)
        return TokenTree.roots(torch.tensor([one.root for one in step.drafting]))

    def learn(self, *what: object) -> None:
        pass


@pytest.mark.parametrize("name", ["small_model", "eagle_3", "union"])
def test_what_nobody_drafts_behind_is_read_when_much_has_gathered(tiny, target, monkeypatch, name: str) -> None:
    monkeypatch.setattr(LevelDrafter, "_MOST_UNREAD", 64)
    reading, drafter = Reading(monkeypatch), drafter_of(name, tiny, target)
    engine = engine_of(target, drafter, speculation=Sleeps())
    handle = engine.submit(LONG[4], params(1, 150)[0])
    counts = []
    while not handle.is_done:
        engine.step()
        counts.append(reading.take())
        assert handle.is_done or handle.request.sequence.num_computed - drafter.covered(handle.id) <= 65
    assert max(counts) == 64 and sum(counts) == 128


def test_features_wait_until_they_are_wanted_and_are_then_the_same(tiny, target, monkeypatch) -> None:
    """Where nothing is drafted a head does nothing at all; what it drafts later is as if it had read along."""
    fused: list[int] = []
    fuse = EagleHead.fuse
    monkeypatch.setattr(EagleHead, "fuse", lambda head, states: fused.append(len(states[0])) or fuse(head, states))
    trees = []
    for most_unread in (512, 1):
        monkeypatch.setattr(LevelDrafter, "_MOST_UNREAD", most_unread)
        monkeypatch.setattr(LevelDrafter, "_BULK", most_unread)
        reading, drafter = Reading(monkeypatch), drafter_of("eagle_3", tiny, target)
        fused.clear()
        engine = engine_of(target, drafter, speculation=Sleeps(40))
        # Side by side, one of them with a prompt in several chunks: each holds on to its own states alone.
        handles = [engine.submit(LONG[row], one) for row, one in zip((4, 2), params(2, 60), strict=True)]
        while len(handles[0].request.sequence.token_ids) < 30:
            engine.step()
        if most_unread > 1:
            # Chunks of a prompt are read with the next one.
            assert reading.take() <= sum(fused) <= len(LONG[2]) + 1
            for state in drafter._states.values():
                kept = [one for piece in state.hidden for one in piece.values()]
                assert all(one.untyped_storage().nbytes() <= 32 * one.nbytes for one in kept)
        while not engine.is_idle:
            engine.step()
        trees.append([(one.result.token_ids, one.result.metrics.drafted_by_depth) for one in handles])
    assert trees[0] == trees[1]


@pytest.mark.parametrize("name", ["small_model", "eagle_3", "union"])
def test_a_prompt_is_shared_although_nothing_is_drafted(tiny, target, name: str) -> None:
    engine = engine_of(target, drafter_of(name, tiny, target), prefill_chunk=512, speculation=Sleeps())
    engine.generate([LONG[0]] * 2, params(2))
    assert engine.metrics.num_prefix_tokens >= 72


def test_a_prompt_that_will_have_no_drafts_is_not_read(tiny, target, monkeypatch) -> None:
    reading = Reading(monkeypatch)
    engine = engine_of(target, drafter_of("small_model", tiny, target))
    engine.generate([LONG[0]], params(1, length=2))
    short = SmallModelDrafter(PagedModel(tiny(0, max_position_embeddings=32)))
    engine_of(target, short).generate([LONG[0]], params(1))
    assert reading.take() == 0
