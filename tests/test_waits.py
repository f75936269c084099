"""What the host waits for in a step on CUDA, on a device that is not there: tokens, and trees that were drafted on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tiny
from head_cases import eagle_config
from pretend import DEVICE, TO_DEVICE, TO_HOST, OnDevice, PretendedCuda, moved, pretended_cuda
from torch import nn

from specdec import Engine, PagedModel, SamplingParams
from specdec.certificates.checks import FrozenCosts
from specdec.cost import DraftCost, TargetCost
from specdec.drafters import EagleDrafter, MedusaDrafter, NGramDrafter, SmallModelDrafter, Static, TopK, chain
from specdec.drafters.adaptive import AdaptiveSpeculation
from specdec.drafters.heads import EagleHead, MedusaConfig, MedusaHeads
from specdec.drafters.pruning import prune
from specdec.drafters.union import UnionDrafter
from specdec.graphs import ForwardGraphs
from specdec.int_tensor import fetched, int_tensor, sent_together
from specdec.interfaces import AcceptanceRule, Drafter, TreePolicy
from specdec.kv_cache import KVCache
from specdec.static_shapes import Ladder
from specdec.tree import TokenTree
from specdec.verifiers import Follow, Rejection, Verifier

PROMPTS = [[5, 6, 7, 5, 6, 7, 5], list(range(3, 16)), [9, 9, 4, 9, 9]]
Move = Callable[[nn.Module], Any]


@pytest.fixture
def device() -> Iterator[PretendedCuda]:
    with pretended_cuda() as mode:
        yield mode


def _drafter(name: str, target: PagedModel, move: Move) -> Drafter | None:
    torch.manual_seed(0)
    if name == "ngram":
        return NGramDrafter()
    if name == "small_model":
        return SmallModelDrafter(PagedModel(move(make_tiny(noise=0.02))))
    if name == "eagle":
        return EagleDrafter(move(EagleHead(eagle_config(target, 3))))
    if name == "union":
        return UnionDrafter([NGramDrafter(), EagleDrafter(move(EagleHead(eagle_config(target, 3))))])
    if name == "medusa":
        return MedusaDrafter(move(MedusaHeads(MedusaConfig(target.hidden_size, target.vocab_size, 3))))
    return None


def _engine(name: str, policy: TreePolicy | None, rule: AcceptanceRule, move: Move) -> Engine:
    name, _, way = name.partition(" ")
    target = PagedModel(move(make_tiny()))
    settings: dict[str, Any] = {"max_batch_size": 3, "page_size": 4, "num_pages": 100, "cuda_graphs": False}
    if way == "adaptive":
        assert policy is not None
        # Drafts are next to free, and the clock stands still.
        costs = FrozenCosts(TargetCost((1, 2, 3), (1.0, 1.01, 1.02)), DraftCost(0.0))
        settings["speculation"] = AdaptiveSpeculation(
            policy, costs, device=target.device, explore=0.0, clock=lambda: 0.0
        )
    engine = Engine(Verifier(target, rule), _drafter(name, target, move), policy, **settings)
    if way == "padded":
        # As for graphs, but for the recording.
        ladder = Ladder(batches=(1, 4), nodes=(1, 8), max_words=1, min_keys=32, max_keys=64)
        for storage in engine.pool.storages:
            assert isinstance(storage, KVCache)
            storage.graphs = ForwardGraphs(target.device, ladder, captures=False)
    return engine


CASES: list[tuple[str, TreePolicy | None, type[Follow] | type[Rejection], float, int]] = [
    ("plain", None, Follow, 1.0, 1),
    ("plain", None, Follow, 0.0, 1),
    ("ngram", TopK(8, 3, 2), Follow, 1.0, 1),
    ("ngram", chain(3), Rejection, 1.0, 1),
    ("small_model", chain(3), Rejection, 1.0, 1),
    ("small_model", Static([[0], [1], [0, 0], [1, 0]]), Follow, 0.0, 1),
    ("medusa", Static([[0], [1], [0, 0]]), Follow, 1.0, 1),
    ("eagle", Static([[0], [1], [0, 0]]), Follow, 1.0, 1),
    # How these trees branch is decided on the device, and the host packs the forward by it.
    ("eagle", TopK(8, 3, 2), Follow, 1.0, 2),
    ("small_model", TopK(8, 3, 2), Follow, 0.0, 2),
    ("eagle padded", chain(2), Follow, 1.0, 1),
    ("small_model adaptive", TopK(8, 3, 2), Follow, 0.0, 2),
    ("union adaptive", TopK(8, 3, 2), Follow, 0.0, 2),
]


@pytest.mark.parametrize(("name", "policy", "rule", "temperature", "num_waits"), CASES)
def test_the_host_waits_for_tokens_alone(name, policy, rule, temperature, num_waits) -> None:
    """Requests of three kinds and lengths, so that all sorts of batches occur; the texts are those of the CPU."""
    one = SamplingParams(temperature=temperature, seed=1, max_new_tokens=5, ignore_eos=True)
    strict = replace(
        one, max_new_tokens=7, repetition_penalty=1.2, frequency_penalty=0.1, logit_bias={5: 1.0}, top_p=0.9
    )
    params = [one, strict, replace(one, max_new_tokens=6, top_k=20)]
    wanted = [one.token_ids for one in _engine(name, policy, rule(), lambda m: m).generate(PROMPTS, params)]
    with pretended_cuda() as device:
        engine = _engine(name, policy, rule(), moved)
        handles = [engine.submit(prompt, one) for prompt, one in zip(PROMPTS, params, strict=True)]
        waits = []
        while not engine.is_idle:
            device.waits.clear()
            engine.step()
            waits.append(Counter(device.waits))
    assert [handle.request.result.token_ids for handle in handles] == wanted
    # The first of a batch computes what is kept for all steps, such as tables of frequencies.
    assert len(waits) > 2
    assert max(one[TO_HOST] for one in waits) == num_waits, waits
    assert all(one.keys() == {TO_HOST} for one in waits[2:]), waits


@pytest.mark.parametrize(
    ("look", "name"),
    [
        (lambda one: one.tolist(), TO_HOST),
        (lambda one: one.cpu(), TO_HOST),
        (lambda one: one.sum().item(), "_local_scalar_dense"),
        (lambda one: bool(one.any()), "_local_scalar_dense"),
        (lambda one: int(one[0]), "_local_scalar_dense"),
        (lambda one: [0, 1, 2][one[0]], "_local_scalar_dense"),
        (lambda one: one.nonzero(), "nonzero"),
        (lambda one: one[one > 1], "a mask as index"),
        (lambda one: one.bincount(), "bincount"),
        (lambda one: one.repeat_interleave(one), "repeat_interleave"),
        (lambda one: one[[0, 1]], TO_DEVICE),
        (lambda one: torch.tensor([1, 2], device=DEVICE), TO_DEVICE),
        (lambda one: torch.zeros(2).to(DEVICE), TO_DEVICE),
    ],
)
def test_waits_are_seen(device, look, name) -> None:
    look(int_tensor([0, 1, 2], DEVICE))
    assert device.waits == [name]


def test_what_is_queued_is_not_waited_for(device) -> None:
    one = int_tensor([0, 1, 2], DEVICE)
    assert isinstance(one, OnDevice) and one.device == DEVICE
    two, three = sent_together([torch.arange(4).view(2, 2), torch.arange(3)], DEVICE)
    later = torch.arange(3, device=DEVICE).to("cpu", non_blocking=True)
    assert not device.waits
    assert (two[1] + one[:2]).tolist() == [2, 4] and torch.equal(later, torch.arange(3))
    device.waits.clear()
    assert [part.tolist() for part in fetched([two, three])] == [[[0, 1], [2, 3]], [0, 1, 2]]
    assert device.waits == [TO_HOST]
    with pytest.raises(RuntimeError, match="on the host and on the device"):
        one + torch.arange(3)


ROWS = [([5, 1, 2, 3], [-1, 0, 0, 1]), ([6, 4], [-1, 0])]
CONFIDENCE = [[float("nan"), 0.5, 0.25, 0.125], [float("nan"), 0.75]]


def _same(one: TokenTree, other: TokenTree) -> None:
    for name in ("tokens_BN", "parents_BN", "num_nodes_B", "draws_BM", "kinds_BM", "depth_BN", "ancestors_BNN"):
        found = getattr(one, name)
        assert isinstance(found, OnDevice)
        assert torch.equal(found.cpu(), getattr(other, name)), name
    assert one.spec == other.spec and one.vocab_size == other.vocab_size
    assert one.confidence_BN is not None and other.confidence_BN is not None
    torch.testing.assert_close(one.confidence_BN.cpu(), other.confidence_BN, equal_nan=True)


def test_trees_from_lists_need_not_be_fetched(device) -> None:
    on_cpu = TokenTree.from_lists(ROWS, 8, CONFIDENCE)
    tree = TokenTree.from_lists(ROWS, 8, CONFIDENCE, DEVICE)
    keep_BN = torch.tensor([[True, True, False, True], [True, False, False, False]])
    cut, bare = prune(tree, keep_BN), TokenTree.roots(torch.tensor([3]), 8).to(DEVICE)
    both = TokenTree.concat([tree, bare])
    assert tree.spec and tree.shape.sizes == [4, 2] and len(tree.depth_BN) == 2 and tree.on_cpu.path(3) == [0, 1, 3]
    assert not device.waits
    _same(tree, on_cpu)
    wanted = prune(on_cpu, keep_BN)
    _same(cut.tree, wanted.tree)
    assert torch.equal(cut.origin_BN.cpu(), wanted.origin_BN)
    _same(both, TokenTree.concat([on_cpu, TokenTree.roots(torch.tensor([3]), 8)]))


def test_trees_of_a_device_are_fetched_once(device) -> None:
    on_cpu = TokenTree.from_lists(ROWS, 8, CONFIDENCE)
    fields = [on_cpu.tokens_BN, on_cpu.parents_BN, on_cpu.num_nodes_B]
    tokens_BN, parents_BN, num_nodes_B = sent_together(fields, DEVICE)
    confidence_BN = on_cpu.confidence_BN.pin_memory().to(DEVICE, non_blocking=True)
    tree = TokenTree.from_parents(tokens_BN, parents_BN, num_nodes_B, 8, confidence_BN)
    assert device.waits == [TO_HOST]
    assert tree.spec == on_cpu.spec and tree.shape.sizes == [4, 2]
    np.testing.assert_equal(tree.on_cpu.confidence_BN.numpy(), on_cpu.confidence_BN.numpy())
    assert torch.equal(tree.on_cpu.tokens_BN, on_cpu.tokens_BN)
    assert device.waits == [TO_HOST]
    _same(tree, on_cpu)
    twins_BN = torch.zeros_like(tokens_BN)
    with pytest.raises(ValueError, match="row 0: token 0 comes twice below node 0"):
        TokenTree.from_parents(twins_BN, parents_BN, num_nodes_B, 8)


def test_tokens_that_the_host_does_not_know_are_checked_when_they_come(device) -> None:
    on_cpu = TokenTree.from_lists(ROWS, 8)
    tokens_BN = torch.zeros(2, 4, dtype=torch.int64, device=DEVICE)
    tree = TokenTree.from_parents(tokens_BN, on_cpu.parents_BN, on_cpu.num_nodes_B, 8)
    assert tree.shape.sizes == [4, 2] and tree.spec == on_cpu.spec and len(tree.depth_BN) == 2
    assert not device.waits and not tree.is_known
    tree.check_tokens(on_cpu.tokens_BN)
    with pytest.raises(ValueError, match="row 0: token 0 comes twice below node 0"):
        tree.check_tokens(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="row 0: token 0 comes twice below node 0"):
        _ = tree.on_cpu
