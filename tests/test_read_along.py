"""Drafters with a network read long prompts along with the target: in pieces, never more in a step than is due."""

from __future__ import annotations

import random

import pytest
import torch
from head_cases import eagle_config

from specdec import Engine, PagedModel, SamplingParams
from specdec.certificates.mutants import Check, Mutant, mutated
from specdec.drafters import EagleDrafter, NGramDrafter, Sampled, SmallModelDrafter, UnionDrafter
from specdec.drafters.heads import EagleHead
from specdec.drafters.levels import LevelDrafter, LevelRound
from specdec.drafters.pruning import shallower
from specdec.handle import Handle
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
        monkeypatch.setattr(LevelRound, "segment", self._counting(LevelRound.segment))

    def _counting(self, segment):  # type: ignore[no-untyped-def]
        def counted(draft, span):  # type: ignore[no-untyped-def]
            self.count += span.end - span.start
            return segment(draft, span)

        return counted

    def take(self) -> int:
        count, self.count = self.count, 0
        return count


@pytest.mark.parametrize("share_prefixes", [True, False])
@pytest.mark.parametrize("name", ["small_model", "eagle_1", "eagle_3"])
def test_no_step_has_more_to_read_than_the_budget(tiny, target, monkeypatch, name: str, share_prefixes: bool) -> None:
    monkeypatch.setattr(LevelDrafter, "_MOST_UNREAD", CHUNK)
    # A head may leave as much of each prompt unread.
    waiting = 0 if name == "small_model" else BATCH * CHUNK
    reading = Reading(monkeypatch)
    engine = engine_of(target, drafter_of(name, tiny, target), share_prefixes=share_prefixes)
    handles = [engine.submit(prompt, one) for prompt, one in zip(LONG, params(len(LONG)), strict=True)]
    most = 0
    while not engine.is_idle:
        engine.step()
        engine.check()
        # Beside the budget for prompts, what a step accepts of each sequence is read in the next one.
        most = max(most, reading.take())
        assert most <= CHUNK + BATCH * (POLICY.max_depth + 1) + waiting
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
            assert not reading.take() and not fused
            for state in drafter._states.values():
                kept = state.features._raw
                assert kept and all(one.untyped_storage().nbytes() <= 32 * one.nbytes for one in kept)
        while not engine.is_idle:
            engine.step()
        trees.append([(one.result.token_ids, one.result.metrics.drafted_by_depth) for one in handles])
    assert trees[0] == trees[1]


@pytest.mark.parametrize("name", ["small_model", "eagle_3", "union"])
def test_a_prompt_is_shared_although_nothing_is_drafted(tiny, target, monkeypatch, name: str) -> None:
    reading = Reading(monkeypatch)
    engine = engine_of(target, drafter_of(name, tiny, target), prefill_chunk=512, speculation=Sleeps())
    engine.generate([LONG[0]] * 2, params(2))
    assert engine.metrics.num_prefix_tokens == 76
    # A head's entries can follow whenever they are wanted.
    assert (reading.take() > 0) == (name == "small_model")


class Dozes(Sleeps):
    """Drafts in some steps, for some of the sequences."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)

    def propose(self, step, drafter, policy, noise) -> TokenTree:  # type: ignore[no-untyped-def]
        if self.chance.random() < 0.6:
            return TokenTree.roots(torch.tensor([one.root for one in step.drafting]))
        depths = [self.chance.choice([0, policy.max_depth]) for _ in step.drafting]
        return drafter.propose(step.drafting, shallower(policy, depths), noise)


def _compare_keys(tiny, target: PagedModel, name: str, seed: int) -> tuple[int, int]:  # type: ignore[no-untyped-def]
    """Holds a head's keys and values in a stream of requests against those that it has alone: how often, and how often some
    had pages of others to read. Prompts begin alike or are what another has said, and there are drafts now and then."""
    drafter, chance, handles = drafter_of(name, tiny, target), random.Random(seed), list[Handle]()
    engine = engine_of(target, drafter, speculation=Dozes(seed), num_pages=60, prefill_chunk=[7, 32, 512][seed % 3])
    stems, num_seen, num_late = [LONG[0][:40], [*LONG[0][:24], *LONG[2][:20]]], 0, 0
    for one in params(14, 16):
        stem = chance.choice([*stems, *(handle.request.sequence.token_ids[:60] for handle in handles[-2:])])
        handles.append(engine.submit([*stem, *chance.choices(range(90), k=1 + chance.randrange(5))], one))
        for _ in range(chance.randrange(4)):
            engine.step()
            engine.check()
        for seq in (request.sequence for request in engine.running):
            state = drafter._states.get(seq.id)
            num_late += state is not None and bool(state.waiting())
            if state is None or state.waiting() or state.num_computed < 8:
                continue
            found = drafter._cache.gather(0, seq.table, state.num_computed + 1)
            expected = _keys_alone(tiny, target, name, seq.token_ids[: state.num_computed + 1])
            # In the first slot no entry lies.
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours[1:], theirs[1:], rtol=1e-4, atol=1e-5)
            num_seen += 1
    assert engine.metrics.num_prefix_tokens > 100
    return num_seen, num_late


@pytest.mark.parametrize("name", ["eagle_1", "eagle_3"])
def test_a_head_that_reads_pages_of_others_late_has_the_keys_that_it_has_alone(tiny, target, name: str) -> None:
    num_seen, num_late = (
        sum(one) for one in zip(*(_compare_keys(tiny, target, name, seed) for seed in range(4)), strict=True)
    )
    assert num_seen > 50 and num_late > 5


EAGLE = "specdec.drafters.eagle"
# No text depends on what a head reads, so each of these is planted and the keys are looked at.
MISTAKES = {
    "the first entry of a page left out": (f"{EAGLE}:EagleDrafter._fill", "page_size - 1, 0", "page_size, 0"),
    "all shared pages taken for read": (f"{EAGLE}:EagleDrafter.adopt", "if not note.is_read", "if False"),
    "features of the next entry": (
        f"{EAGLE}:_EagleRound._read_adopted",
        "fused(note.start, note.end)",
        "fused(note.start + 1, note.end + 1)",
    ),
    "full pages taken for read": (f"{EAGLE}:EagleDrafter._fill", "min(max(state.num_computed, first), last)", "last"),
    "entries in the slots of other tokens": (
        "specdec.drafters.levels:LevelRound.__init__",
        "behind(self.shift)",
        "behind(0)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_head_that_misreads_shared_pages_is_seen_by_its_keys(tiny, target, mistake: str) -> None:
    with (
        mutated(Mutant(mistake, *MISTAKES[mistake], Check("law", float))),
        pytest.raises((AssertionError, RuntimeError)),
    ):
        for seed in range(4):
            _compare_keys(tiny, target, "eagle_3", seed)


def _keys_alone(tiny, target: PagedModel, name: str, token_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[no-untyped-def]
    """The head's keys and values of a text that it reads at once."""
    drafter = drafter_of(name, tiny, target)
    engine = engine_of(target, drafter, share_prefixes=False, prefill_chunk=512)
    handle = engine.submit(token_ids, SamplingParams(max_new_tokens=8, ignore_eos=True))
    while handle.request.sequence.round < 2:
        engine.step()
    keys, values = drafter._cache.gather(0, handle.request.sequence.table, len(token_ids))
    return keys.clone(), values.clone()


@pytest.mark.parametrize("most_waiting", [64, 3])
def test_what_many_share_is_read_once(tiny, target, monkeypatch, most_waiting: int) -> None:
    """Late, or where the features of too many pages wait, with the prompt."""
    monkeypatch.setattr(EagleDrafter, "_MOST_WAITING", most_waiting)
    monkeypatch.setattr(EagleDrafter, "_WAITING_SHARES", {})
    reading, drafter = Reading(monkeypatch), drafter_of("eagle_3", tiny, target)
    engine = engine_of(target, drafter, max_batch_size=8, prefill_chunk=32, speculation=Sleeps(12))
    handles = [engine.submit([*LONG[0], i], one) for i, one in enumerate(params(8, 30))]
    for _ in range(10):
        engine.step()
    assert engine.metrics.num_prefix_tokens == 7 * 80
    before = reading.take()
    assert before == 0 if most_waiting == 64 else 64 <= before <= 80 + 8 * 10
    while all(handle.request.sequence.round < 13 for handle in handles):
        engine.step()
    lengths = [len(handle.request.sequence.token_ids) for handle in handles]
    # Each has read what is its own, and one of them the prompt.
    assert before + reading.take() <= 80 + sum(lengths) - 8 * 80


def test_a_prompt_that_will_have_no_drafts_is_not_read(tiny, target, monkeypatch) -> None:
    reading = Reading(monkeypatch)
    engine = engine_of(target, drafter_of("small_model", tiny, target))
    engine.generate([LONG[0]], params(1, length=2))
    short = SmallModelDrafter(PagedModel(tiny(0, max_position_embeddings=32)))
    engine_of(target, short).generate([LONG[0]], params(1))
    assert reading.take() == 0
