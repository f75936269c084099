"""A drafter of one's own: `feature_layers`, `observe`, `propose` and `forget` are enough, under any load."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from traffic import PARAMS, PROMPTS, STEMS, SYSTEMS, VOCAB, System, Traffic, ngram, target

from specdec import Engine, SamplingParams
from specdec.drafters import TopK, UnionDrafter, chain
from specdec.interfaces import Commit, Drafter, PagedDrafter
from specdec.noise import CounterNoise
from specdec.off_pages import OffPages, completed
from specdec.pages import PagePool, PageTable
from specdec.sequence import Sequence
from specdec.tree import TokenTree
from specdec.verifiers import Verifier


class Repeats:
    """Guesses that a text goes on as behind the last place with the same token, from what it has observed of it alone, which
    must be all, once and in order, with a feature of each token where it wants any."""

    def __init__(self, *feature_layers: int) -> None:
        self.feature_layers = feature_layers
        self.texts: dict[int, list[int]] = defaultdict(list)

    def observe(self, commits: Seq[Commit]) -> None:
        for one in commits:
            text = self.texts[one.sequence_id]
            assert len(text) == one.start, "tokens were left out, or came twice"
            text += one.token_ids
            for layer in self.feature_layers:
                assert len(one.hidden[layer]) == len(one.token_ids)

    def propose(self, sequences: Seq[Sequence], policy, noise) -> TokenTree:
        paths = []
        for one in sequences:
            text = self.texts[one.id]
            assert text == one.token_ids[:-1]
            places = [place for place, token in enumerate(text) if token == one.root][-1:]
            depth = min(policy.max_depth, one.max_draft_depth)
            paths.append([text[place + 1 : place + 1 + depth] for place in places])
        return TokenTree.from_paths([one.root for one in sequences], paths, VOCAB)

    def forget(self, sequence_ids: Seq[int]) -> None:
        for id in sequence_ids:
            self.texts.pop(id, None)


SYSTEMS_WITH_OWN: dict[str, System] = {
    "tokens": System(Repeats, chain(3)),
    "features": System(lambda: Repeats(1), chain(3)),
    "adaptive": System(Repeats, chain(3), is_adaptive=True),
    "union": System(lambda: UnionDrafter([ngram(), Repeats(0, 1)], enough=2.0), TopK(6, 3, 2)),
}


@pytest.mark.parametrize("name", SYSTEMS_WITH_OWN)
def test_it_needs_four_members_under_any_load(name: str) -> None:
    chance = random.Random(1)
    traffic = Traffic(SYSTEMS_WITH_OWN[name], page_size=4, num_pages=15, max_batch_size=4, prefill_chunk=8)
    for _ in range(60):
        traffic.submit(chance.randrange(len(PROMPTS)), chance.randrange(len(PARAMS)))
        for _ in range(chance.randrange(4)):
            traffic.step()
        if chance.random() < 0.1:
            traffic.cancel(chance.randrange(100))
    traffic.finish()
    metrics = traffic.engine.metrics
    assert metrics.num_preemptions > 0 and sum(metrics.accepted_by_depth) > 0
    # What has been computed for others came without features, so these were computed again.
    assert (metrics.num_prefix_tokens > 0) == (name in ("tokens", "adaptive"))
    own = [
        one
        for one in (traffic.engine.drafter, *getattr(traffic.engine.drafter, "drafters", []))
        if hasattr(one, "texts")
    ]
    assert len(own) == 1 and not own[0].texts


def test_the_one_of_the_docs_drafts() -> None:
    page = (Path(__file__).parents[1] / "docs" / "engine.md").read_text()
    (code,) = re.findall(r"```python\n(from specdec[^`]*?\nclass Repeats:.*?)\nEngine\(", page, re.S)
    scope: dict[str, Any] = {}
    exec(code, scope)
    engine = Engine(Verifier(target()), scope["Repeats"](), chain(4))
    prompts = [list(stem) for stem in STEMS]
    found = [one.token_ids for one in engine.generate(prompts, PARAMS[0])]
    assert found == [one.token_ids for one in Engine(Verifier(target())).generate(prompts, PARAMS[0])]
    assert sum(engine.metrics.accepted_by_depth) > 0


def test_it_may_be_bound() -> None:
    class Binds(Repeats):
        bound = None

        def bind(self, target, pool) -> None:
            self.bound = target

    drafter = Binds()
    assert Engine(Verifier(target()), drafter, chain(2)).drafter.bound is drafter.bound is target()


def test_its_trees_go_where_the_target_is() -> None:
    drafter = completed(Repeats())
    elsewhere = SimpleNamespace(device=torch.device("meta"))
    drafter.bind(elsewhere, PagePool(0))
    one = Sequence(0, [3], SamplingParams(), 0, PageTable(PagePool(0)), 8)
    drafter.observe([Commit(0, 0, [], 3, None, {})])
    assert drafter.propose([one], chain(2), CounterNoise([0], [0], [0])).tokens_BN.device.type == "meta"


def test_what_is_missing_is_named() -> None:
    class Deaf:
        feature_layers = ()

        def propose(self, sequences, policy, noise) -> TokenTree: ...

    class Half(Repeats):
        def covered(self, sequence_id: int) -> int:
            return 0

    with pytest.raises(
        ValueError, match=r"drafter Deaf lacks observe, forget: every drafter has feature_layers, observe"
    ):
        Engine(Verifier(target()), Deaf(), chain(2))
    with pytest.raises(
        ValueError, match=r"drafter Half .* lacks bind, covers_unasked, note, adopt, num_unread: give all"
    ):
        UnionDrafter([Half()])


@pytest.mark.parametrize("make", [one.drafter for one in SYSTEMS.values() if one.drafter is not None])
def test_ours_speak_for_themselves(make: Callable[[], Drafter]) -> None:
    drafter = make()
    assert completed(drafter) is drafter and isinstance(drafter, PagedDrafter)
    assert (
        not isinstance(Repeats(), PagedDrafter)
        and isinstance(Repeats(), Drafter)
        and not isinstance(OffPages(), Drafter)
    )
