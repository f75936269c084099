"""Confidence trees of EAGLE heads in one C++ call against the same trees grown level by level."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_tiny
from cpu_targets import kernels as kernels
from head_cases import eagle_config

from specdec import Engine, PagedModel, SamplingParams
from specdec.drafters import EagleDrafter, NGramDrafter, Sampled, TopK, chain
from specdec.drafters.heads import EagleHead
from specdec.drafters.union import UnionDrafter
from specdec.tree import TokenTree
from specdec.verifiers import Verifier

pytestmark = pytest.mark.usefixtures("kernels")

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
LAYER = {"intermediate_size": 96, "num_heads": 4, "num_kv_heads": 2, "head_size": 32}
HEADS: dict[str, dict[str, Any]] = {
    "eagle_1": {"version": 1},
    "eagle_1, fc with bias": {"version": 1, "fc_bias": True},
    "eagle_3": {"version": 3},
    "eagle_3, own tokens": {"version": 3, "draft_vocab_size": 41},
    "eagle_3, normed residual": {"version": 3, "norm_before_residual": True, "attention_bias": True},
    "eagle_3, own embedding": {"version": 3, "has_own_embedding": True},
    "eagle_1, rounded": {"version": 1, "int8": True},
    "eagle_3, rounded": {"version": 3, "draft_vocab_size": 41, "int8": True},
}
POLICIES = {
    "wide": TopK(total=14, depth=4, k=3),
    "all kept": TopK(total=60, depth=3, k=4),
    "few kept": TopK(total=4, depth=5, k=4),
    "chain": TopK(total=5, depth=4, k=1),
    "one level": TopK(total=6, depth=1, k=5),
}
PROMPTS = [[5, 6, 7, 8, 9, 5, 6, 7], [9, 10, 11], [3] * 23, [4, 5, 4, 5, 4], [8]]


def make_target() -> PagedModel:
    model = PagedModel(make_tiny(**SIZES).bfloat16(), name="target")
    model.pack()
    return model


def make_drafter(target: PagedModel, settings: dict[str, Any], seed: int = 1) -> EagleDrafter:
    torch.manual_seed(seed)
    rest = dict(settings)
    version, int8 = rest.pop("version"), rest.pop("int8", False)
    head = EagleHead(eagle_config(target, version, **LAYER | rest))
    # Large weights: near-ties would be broken by rounding.
    for name, weight in head.named_parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.15)
        elif "bias" in name:
            torch.nn.init.normal_(weight, std=0.5)
    if head.draft_to_target_R is not None:
        head.draft_to_target_R.copy_(torch.randperm(target.vocab_size)[: len(head.draft_to_target_R)].sort().values)
    return EagleDrafter(head.eval(), int8=int8)


def first_of_equals(values: torch.Tensor, k: int) -> Any:
    found = values.sort(stable=True, dim=-1, descending=True)
    return SimpleNamespace(values=found.values[..., :k], indices=found.indices[..., :k])


def trees(
    target: PagedModel, drafter: EagleDrafter, policy: TopK, at_once: bool, limits: Seq[int], monkeypatch: Any
) -> list[TokenTree]:
    """The trees of a few steps, of requests that end at different lengths and lie on scattered pages."""
    found: list[TokenTree] = []
    propose = drafter.propose

    def record(*args: Any) -> TokenTree:
        found.append(propose(*args))
        return found[-1]

    with monkeypatch.context() as patch:
        patch.setattr(drafter, "propose", record)
        if not at_once:
            patch.setattr(EagleDrafter, "grows_at_once", False)
            # Logits in bfloat16 are often equal; torch then takes any, the kernel the first.
            patch.setattr(torch.Tensor, "topk", first_of_equals)
        engine = Engine(Verifier(target), drafter, policy, max_batch_size=5, prefill_chunk=7, page_size=4)
        params = [SamplingParams(max_new_tokens=limit, ignore_eos=True) for limit in limits]
        engine.generate(PROMPTS, params)
    return found


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", HEADS)
def test_one_call_grows_what_the_levels_grow(name: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_target()
    drafter, limits = make_drafter(target, HEADS[name]), [9, 4, 6, 1, 12]
    quick = trees(target, drafter, POLICIES[policy], True, limits, monkeypatch)
    assert drafter.grows_at_once
    slow = trees(target, drafter, POLICIES[policy], False, limits, monkeypatch)
    assert len(quick) == len(slow) and sum(int(one.num_nodes_B.sum()) for one in quick) > 30
    for one, other in zip(quick, slow, strict=True):
        assert torch.equal(one.num_nodes_B, other.num_nodes_B)
        assert torch.equal(one.tokens_BN, other.tokens_BN) and torch.equal(one.parents_BN, other.parents_BN)
        if one.max_nodes == 1:
            continue
        confidence = (tree.confidence_BN[one.is_node_BN] for tree in (one, other))
        # Level by level it is a difference of sums along paths, which may be a hundred.
        torch.testing.assert_close(*confidence, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_more_children_than_outputs_go_level_by_level(monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_target()
    drafter = make_drafter(target, {"version": 3, "draft_vocab_size": 3})
    policy = TopK(total=20, depth=3, k=5)
    quick = trees(target, drafter, policy, True, [8] * 5, monkeypatch)
    slow = trees(target, drafter, policy, False, [8] * 5, monkeypatch)
    assert [one.tokens_BN.tolist() for one in quick] == [one.tokens_BN.tolist() for one in slow]


def test_texts_are_those_of_plain_decoding() -> None:
    target = make_target()
    drafter = make_drafter(target, HEADS["eagle_3"])
    params = SamplingParams(max_new_tokens=20, ignore_eos=True, temperature=0.8, seed=3)
    plain = [one.token_ids for one in Engine(Verifier(target)).generate(PROMPTS, params)]
    wide = TopK(total=14, depth=4, k=3)
    for policy in (Sampled([2, 1]), chain(3)):
        engine = Engine(Verifier(target), drafter, policy)
        assert [one.token_ids for one in engine.generate(PROMPTS, params)] == plain
    union = UnionDrafter([NGramDrafter(), make_drafter(target, HEADS["eagle_1, rounded"])])
    assert [one.token_ids for one in Engine(Verifier(target), union, wide).generate(PROMPTS, params)] == plain
