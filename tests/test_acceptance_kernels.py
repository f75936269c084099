"""Acceptance in one kernel, interpreted on the CPU, against the rules themselves and the eager reference."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from specdec.certificates.processes import ragged_cases
from specdec.certificates.worlds import KINDS, FixedLaws, TableRound, World
from specdec.drafters import Mixed, Sampled, SmallModelDrafter, Static, chain
from specdec.drafters.growth import GrowingPolicy
from specdec.engine import Engine
from specdec.interfaces import Acceptance
from specdec.kernels import acceptance
from specdec.kernels.acceptance import AcceptedPath
from specdec.model import PagedModel
from specdec.noise import CounterNoise, PositionKey
from specdec.sampling import BatchSampling, ModelLaws, SamplingParams
from specdec.tree import TokenTree
from specdec.verifiers import RULES, Verifier, on_device

POLICIES: dict[str, GrowingPolicy] = {
    "static": Static([[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]]),
    "chain": chain(3),
    "chain_iid": chain(3, "iid"),
    "mixed_chain": Mixed([1, 1]),
    "iid": Sampled([3, 2]),
    "without": Sampled([3, 2], "without_replacement"),
    "mixed": Mixed([3, 2]),
}
CASES = [
    (policy, rule)
    for policy in POLICIES
    for rule in ("follow", "rejection", "traversal")
    if RULES[rule]().accepts(POLICIES[policy].spec) is None
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels take vocabularies in pieces, and what nobody writes holds NaN or the largest integer."""
    pytest.importorskip("triton")
    if os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("these tensors are on the CPU, where kernels only run interpreted")
    from specdec.kernels.acceptance import triton as kernels

    monkeypatch.setattr(kernels, "block_size", lambda size: 4)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _trees(policy: GrowingPolicy, seed: int, num_kinds: int = 4) -> tuple[TokenTree, Tensor, CounterNoise]:
    """Ragged trees for all kinds of laws, those with zeros and equal ones among them; logits of the target's laws."""
    kinds = [KINDS[(seed * num_kinds + i) % len(KINDS)] for i in range(num_kinds)]
    world = World.tree(5, policy.max_depth + 2, seed).select(*kinds)
    rows = ragged_cases(world, policy.max_depth)
    kinds_B, states_B = (torch.tensor([getattr(row, name) for row in rows]) for name in ("kind", "state"))
    noise = CounterNoise([seed * 1000 + row for row in range(len(rows))], range(len(rows)), [7] * len(rows))
    round_ = TableRound(world, kinds_B, states_B, [row.limit for row in rows])
    round_.world = replace(world, draft_KCV=world.draft_KCV.float())
    tree = policy.grow(round_, noise).tree
    return tree, FixedLaws(world, tree, kinds_B, states_B).all()[tree.is_node_BN].log().float(), noise


def _laws(tree: TokenTree, logits_TV: Tensor, temperature: float = 1.0) -> ModelLaws:
    size = tree.batch_size
    params = SamplingParams(temperature=temperature)
    return ModelLaws(logits_TV, tree, BatchSampling([params] * size, [[]] * size, [[]] * size, logits_TV.shape[1]))


def _same(got: Acceptance | AcceptedPath, wanted: Acceptance) -> None:
    path_BN = got.path_BK if isinstance(got, Acceptance) else got.path_BN
    width = wanted.path_BK.shape[1]
    assert torch.equal(path_BN[:, :width], wanted.path_BK) and bool((path_BN[:, width:] == -1).all())
    assert torch.equal(got.num_accepted_B, wanted.num_accepted_B)
    assert torch.equal(got.next_token_B, wanted.next_token_B)


@pytest.mark.parametrize(("policy", "rule"), CASES)
def test_kernel_rule_and_reference_agree(monkeypatch: pytest.MonkeyPatch, policy: str, rule: str) -> None:
    accepted = 0
    for seed in range(2):
        tree, logits, noise = _trees(POLICIES[policy], seed)
        laws = _laws(tree, logits)
        wanted = RULES[rule]()(tree, laws, noise)
        accepted += int(wanted.num_accepted_B.sum())
        if rule == "follow":
            drawn = laws.drawn(lambda rows, depths, noise=noise: noise.keys(PositionKey(depths), rows))
            op, arguments = acceptance.follow, (tree.tokens_BN, tree.parents_BN, drawn, laws.first_B)
        else:
            op = getattr(acceptance, rule)
            arguments = on_device.sampled(tree), laws.packed(), laws.first_B, on_device.coins(noise)
        _same(op(*arguments), wanted)
        with monkeypatch.context() as patch:
            patch.setenv("SPECDEC_KERNELS", "triton")
            got = op(*arguments)
            assert got.path_BN.shape == tree.tokens_BN.shape
            _same(got, wanted)
    assert accepted


@pytest.mark.parametrize("rule", ["follow", "coupled", "rejection", "traversal"])
def test_rules_come_to_the_same_verdict_in_kernels(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    tree, logits, noise = _trees(POLICIES["chain_iid" if rule == "rejection" else "mixed"], 2, num_kinds=2)
    wanted = RULES[rule]()(tree, _laws(tree, logits), noise)
    monkeypatch.setenv("SPECDEC_KERNELS", "triton")
    got = RULES[rule]()(tree, _laws(tree, logits), noise)
    # As wide as the trees: how long the longest path is, the host does not know.
    assert got.path_BK.shape == tree.tokens_BN.shape
    _same(got, wanted)


@pytest.mark.parametrize("policy", POLICIES)
def test_greedy_requests_take_the_largest_logit(monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    """The rule's own path for them, the kernel, and the walk written out."""
    tree, logits, noise = _trees(POLICIES[policy], 1)
    # With ties, of which the first wins.
    logits = logits.clamp(-1.5, -0.5)
    laws = _laws(tree, logits, temperature=0.0)
    wanted = RULES["follow"]()(tree, laws, noise)
    drawn = logits.argmax(-1)
    _same(acceptance.follow(tree.tokens_BN, tree.parents_BN, drawn, laws.first_B), wanted)
    with monkeypatch.context() as patch:
        patch.setattr(BatchSampling, "is_argmax", False)
        _same(RULES["follow"]()(tree, _laws(tree, logits, temperature=0.0), noise), wanted)
    monkeypatch.setenv("SPECDEC_KERNELS", "triton")
    _same(RULES["follow"]()(tree, _laws(tree, logits, temperature=0.0), noise), wanted)


class Looks(TorchDispatchMode):
    """Notes the operations whose result the host must wait for on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(one, Tensor) and one.dtype == torch.bool for one in (args[1] if len(args) > 1 else ()) or ()
        )
        if by_mask or name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "bincount"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", ["follow", "coupled", "rejection", "traversal"])
def test_from_logits_to_verdict_the_host_does_not_look(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    tree, logits, noise = _trees(POLICIES["chain_iid" if rule == "rejection" else "mixed"], 0, num_kinds=1)
    params = SamplingParams(temperature=0.9, repetition_penalty=1.2, logit_bias={1: 0.5})
    size = tree.batch_size
    sampling = BatchSampling([params] * size, [[1]] * size, [[2]] * size, 5)
    # What trees are like is known before the forward.
    assert tree.spec and len(tree.depth_BN) == size
    with Looks() as eager:
        RULES[rule]()(tree, ModelLaws(logits, tree, sampling), noise)
    assert eager.found
    monkeypatch.setenv("SPECDEC_KERNELS", "triton")
    with Looks() as looks:
        RULES[rule]()(tree, ModelLaws(logits, tree, sampling), noise)
    assert not looks.found


def test_laws_at_and_all_nodes_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    tree, logits, _ = _trees(POLICIES["mixed"], 0, num_kinds=2)
    nodes_B = tree.num_nodes_B - 1
    wanted = _laws(tree, logits).at(nodes_B), _laws(tree, logits).all()
    monkeypatch.setenv("SPECDEC_KERNELS", "triton")
    laws = _laws(tree, logits)
    torch.testing.assert_close((laws.at(nodes_B), laws.all()), wanted)


def test_shapes_that_do_not_fit_are_refused() -> None:
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"tokens \(2, 3\), parents \(2, 2\)"):
        acceptance.follow(tokens, tokens[:, :2], tokens[0], tokens[:, 0])


@pytest.mark.parametrize("rule", ["follow", "rejection", "traversal"])
def test_whole_generations_agree(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    """Requests of all kinds in one batch, drafted for by another model, kernels against eager."""
    from specdec.kernels.acceptance import triton as kernels

    monkeypatch.setattr(kernels, "block_size", lambda size: 64)
    params = [
        SamplingParams(max_new_tokens=4),
        SamplingParams(temperature=1.0, seed=3, max_new_tokens=4, logprobs=1),
        SamplingParams(
            temperature=0.8, top_p=0.9, seed=4, repetition_penalty=1.3, logit_bias={5: 2.0}, max_new_tokens=4
        ),
    ]
    texts = []
    for choice in ("reference", "triton"):
        monkeypatch.setenv("SPECDEC_KERNELS", choice)
        policy = chain(2, "iid") if rule == "rejection" else Mixed([2, 1])
        verifier = Verifier(PagedModel(make_tiny()), RULES[rule]())
        engine = Engine(verifier, SmallModelDrafter(PagedModel(make_tiny(noise=0.02))), policy)
        texts.append([one.token_ids for one in engine.generate([[1, 5, 9], [1, 7], [1, 8, 3, 4]], params)])
    assert texts[0] == texts[1]


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """The interpreter takes Python that the compiler does not."""
    script = Path(__file__).with_name("compile_sampling_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(script.parent.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6
