"""Forwards of fixed shape, padded and run eagerly, give what packed ones give; recorded ones are replayed and copied."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from conftest import make_tiny
from head_cases import eagle_config
from test_model import Scenario, make_pair, plain_logits, poison

from specdec import graphs
from specdec.drafters import EagleDrafter, NGramDrafter, SmallModelDrafter, TopK
from specdec.drafters.heads import EagleHead
from specdec.engine import Engine
from specdec.graphs import ForwardGraphs
from specdec.interfaces import Drafter
from specdec.kv_cache import KVCache
from specdec.model import PagedModel, Segment
from specdec.pages import PagePool, PageTable
from specdec.sampling import SamplingParams
from specdec.static_shapes import Ladder, Rung
from specdec.tree import TokenTree
from specdec.verifiers import Verifier

SMALL = Ladder(batches=(1, 2, 4), nodes=(1, 2, 4, 8, 16), max_rows=32, max_words=2, min_keys=16, max_keys=128)
CPU = torch.device("cpu")


def segment(queries: int, visible: int, tail: int | None = None) -> Segment:
    pool = PagePool(20, page_size=8)
    table = PageTable(pool)
    length = queries if tail is None else tail
    table.reserve(visible + length, 0)
    positions = visible + torch.arange(length)
    mask = None if tail is None else torch.ones(queries, tail, dtype=torch.bool)
    return Segment(table, visible, torch.arange(queries), positions[length - queries :], mask, positions)


@pytest.mark.parametrize(
    ("segments", "rung"),
    [
        ([segment(1, 5)], Rung(1, 1, 1, 16)),
        ([segment(3, 14), segment(7, 2), segment(1, 0)], Rung(4, 8, 1, 32)),
        ([segment(5, 20, tail=65)], Rung(1, 8, 2, 128)),
        ([segment(17, 0)], None),
        ([segment(9, 0)] * 3, None),
        ([segment(1, 0)] * 5, None),
        ([segment(1, 0, tail=129)], None),
        ([segment(1, 128)], None),
    ],
)
def test_the_smallest_shape_that_holds_them(segments, rung):
    assert SMALL.rung(segments) == rung


def test_the_default_ladder_holds_what_engines_run():
    ladder = Ladder()
    for batch, nodes in ((1, 1), (1, 64), (8, 1), (8, 64), (64, 8)):
        rung = ladder.rung([segment(nodes, 3)] * batch)
        assert rung is not None
        assert (rung.batch, rung.nodes) == (batch, nodes)
    assert ladder.rung([segment(100, 0)]) is None


def static_caches(monkeypatch: pytest.MonkeyPatch) -> list[ForwardGraphs]:
    """From now on every model's caches run padded forwards; all of them."""
    made: list[ForwardGraphs] = []
    before = KVCache.__init__

    def init(self: KVCache, *args: object) -> None:
        before(self, *args)
        self.graphs = ForwardGraphs(CPU, SMALL, captures=False)
        made.append(self.graphs)

    monkeypatch.setattr(KVCache, "__init__", init)
    return made


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt2", "gpt_oss", "qwen3_moe"])
def test_padded_forwards_give_the_logits_of_every_path(architecture, monkeypatch):
    """Random chunks and trees over poisoned slots; larger forwards before smaller ones leave nothing behind."""
    made = static_caches(monkeypatch)
    model, reference = make_pair(architecture)
    scenario = Scenario(model, random.Random(3))
    scenario.run(20)
    torch.testing.assert_close(torch.cat(scenario.logits), plain_logits(reference, scenario.paths))
    assert len(made) == 1
    assert len(made[0]) > 3


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_a_padded_forward_writes_to_its_own_slots_and_the_scratch_slot_alone(kernels, monkeypatch):
    monkeypatch.setenv("SPECDEC_KERNELS", kernels)
    model, _ = make_pair("llama")
    pool = PagePool(12, page_size=4)
    cache, table = model.new_cache(pool), PageTable(pool)
    cache.graphs = ForwardGraphs(CPU, SMALL, captures=False)
    table.reserve(12, 0)
    model.forward([Segment(table, 0, torch.arange(5, 11), torch.arange(6))], cache)
    free = list(range(11, 48))
    poison(cache, free)
    before = [tensor.clone() for layer in range(3) for tensor in cache.layer(layer)]
    tree = TokenTree.from_parents(torch.tensor([[11, 12, 13, 14, 15]]), torch.tensor([[-1, 0, 0, 1, 2]]))
    nodes = Segment(table, 6, tree.tokens_BN[0], 6 + tree.depth_BN[0], tree.ancestors_BNN[0])
    found = model.forward([nodes], cache, hidden_layers=(1, 3))
    after = [tensor for layer in range(3) for tensor in cache.layer(layer)]
    for old, new in zip(before, after, strict=True):
        assert new.shape[0] == 48
        assert torch.equal(new[:6], old[:6])
        assert not torch.equal(new[6:11], old[6:11])
        assert new[11:].isnan().all()
    cache.graphs = None
    wanted = model.forward([nodes], cache, hidden_layers=(1, 3))
    torch.testing.assert_close(found.logits_RV, wanted.logits_RV)
    for layer in (1, 3):
        torch.testing.assert_close(found.hidden[layer], wanted.hidden[layer])
    rows = torch.tensor([4, 1])
    cache.graphs = ForwardGraphs(CPU, SMALL, captures=False)
    torch.testing.assert_close(model.forward([nodes], cache, rows).logits_RV, wanted.logits_RV[rows])


def drafters(target: PagedModel) -> Iterator[Drafter]:
    yield NGramDrafter()
    yield SmallModelDrafter(PagedModel(make_tiny(noise=0.02)))
    yield EagleDrafter(EagleHead(eagle_config(target, 3, draft_vocab_size=40)))
    yield EagleDrafter(EagleHead(eagle_config(target, 1)))


@pytest.mark.parametrize("index", range(4))
def test_engines_say_the_same_text(index, monkeypatch):
    """Target and draft models alike, while requests come and go and the cache grows."""
    prompts = [[5, 6, 7, 5, 6, 7, 5], list(range(3, 30)), [9, 9, 4, 9, 9]]
    params = [
        SamplingParams(max_new_tokens=n, ignore_eos=True, temperature=t, seed=1) for n, t in ((20, 0), (30, 1), (9, 0))
    ]

    def texts() -> list[list[int]]:
        target = PagedModel(make_tiny())
        torch.manual_seed(0)
        drafter = list(drafters(target))[index]
        engine = Engine(Verifier(target), drafter, TopK(total=8, depth=3, k=2), max_batch_size=2, page_size=4)
        found = [one.token_ids for one in engine.generate(prompts, params)]
        engine.check()
        return found

    wanted = texts()
    made = static_caches(monkeypatch)
    assert texts() == wanted
    assert len(made) == (1 if index == 0 else 2)
    assert all(len(one) > 1 for one in made)


class Recorded:
    """Stands for a CUDA graph: computes anew into the tensors it was recorded with."""

    def __init__(self, forward: graphs._Forward) -> None:
        self._forward, self.outputs, self.num_replays = forward, forward._body(forward.inputs), 0

    def replay(self) -> None:
        self.num_replays += 1
        for old, new in zip(self.outputs, self._forward._body(self._forward.inputs), strict=True):
            old.copy_(new)


@pytest.fixture
def recording(monkeypatch) -> list[Recorded]:
    recorded: list[Recorded] = []

    def capture(self: graphs._Forward, memory: object) -> None:
        self._graph = Recorded(self)
        self._outputs = self._graph.outputs
        recorded.append(self._graph)

    monkeypatch.setattr(graphs._Forward, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(graphs, "_require_cuda", lambda device: None)
    return recorded


def test_a_recorded_forward_is_replayed_and_its_results_are_copies(recording):
    model, _ = make_pair("llama")
    pool = PagePool(12, page_size=4)
    cache, table = model.new_cache(pool), PageTable(pool)
    cache.graphs = ForwardGraphs(CPU, SMALL)
    table.reserve(30, 0)
    chunks = [
        Segment(table, start, torch.arange(5 + start, 8 + start), torch.arange(start, start + 3)) for start in (0, 3, 6)
    ]
    found = [model.forward([chunk], cache).logits_RV for chunk in chunks]
    assert [one.num_replays for one in recording] == [3]
    cache.graphs = None
    for logits, chunk in zip(found, chunks, strict=True):
        torch.testing.assert_close(logits, model.forward([chunk], cache).logits_RV)
    cache.graphs = ForwardGraphs(CPU, SMALL)
    model.forward(chunks[:1], cache)
    assert len(cache.graphs) == 1
    pool.grow(20)
    assert len(cache.graphs) == 0


def test_what_cannot_be_recorded_runs_as_it_is(recording, monkeypatch):
    def capture(self: graphs._Forward, memory: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs._Forward, "capture", capture)
    model, _ = make_pair("llama")
    pool = PagePool(12, page_size=4)
    cache, table = model.new_cache(pool), PageTable(pool)
    cache.graphs = ForwardGraphs(CPU, SMALL)
    table.reserve(30, 0)
    chunk = Segment(table, 0, torch.arange(5, 8), torch.arange(3))
    with pytest.warns(UserWarning, match=r"CUDA graphs are off.*not permitted when stream is capturing"):
        found = model.forward([chunk], cache).logits_RV
    again = model.forward([chunk], cache).logits_RV
    assert torch.equal(found, again)
    assert len(cache.graphs) == 0


def test_on_the_cpu_nothing_is_recorded():
    with pytest.raises(ValueError, match="CUDA graphs are for CUDA, not for cpu"):
        ForwardGraphs(CPU)
    engine = Engine(Verifier(PagedModel(make_tiny())), cuda_graphs=True)
    assert engine.cache.graphs is None
