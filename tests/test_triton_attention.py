"""The Triton kernels of tree attention against the eager reference in float64: interpreted on the CPU, as they are on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_tree_attention import Case, make_case
from torch import Tensor

from specdec.kernels.dispatch import is_interpreting
from specdec.kernels.tree_attention import AttentionPlan, tree_attention
from specdec.kernels.tree_attention.launch import Launch
from specdec.kernels.tree_attention.triton import tree_attention_triton

DEVICE = "cpu" if is_interpreting() else "cuda"
# Queries, whole tail (None: the queries, causal), visible keys: prompt chunks, trees, one token, an empty context.
RAGGED = [(1, 1, 0), (1, None, 150), (9, 9, 61), (3, 70, 64), (37, None, 33), (2, 5, 0)]


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Whatever is allocated and not written holds NaN."""
    monkeypatch.setenv("SPECDEC_KERNELS", "triton")
    torch.use_deterministic_algorithms(True)
    assert bool(torch.ones(3).new_empty(50).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


def on_device(case: Case) -> Case:
    """The case where the kernels run; the tensors of its plan too."""

    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(DEVICE)

    parts = [
        replace(
            part,
            tail_mask_QM=move(part.tail_mask_QM),
            tail_positions_M=part.tail_positions_M.to(DEVICE),
            slots=move(part.slots),
            _masks={},
            _tiles={},
        )
        for part in case.plan.sequences
    ]
    tensors = (one.to(DEVICE) for one in (case.query_THE, case.keys_SGE, case.values_SGE))
    return Case(*tensors, AttentionPlan(case.plan.slots_T.to(DEVICE), None, parts), case.positions, case.sees)


def wanted(case: Case, monkeypatch: pytest.MonkeyPatch, sinks_H: Tensor | None = None, **options: object) -> Tensor:
    """What the reference says in float64 to the same numbers."""
    tensors = [one.double() for one in (case.query_THE, case.keys_SGE, case.values_SGE)]
    with monkeypatch.context() as patch:
        patch.setenv("SPECDEC_KERNELS", "reference")
        sinks = None if sinks_H is None else sinks_H.double()
        return tree_attention(*tensors, case.plan, sinks_H=sinks, **options).to(case.query_THE.dtype)


def check(case: Case, monkeypatch: pytest.MonkeyPatch, is_invariant: bool = False, **options: object) -> None:
    case = on_device(case)
    arguments = case.query_THE, case.keys_SGE, case.values_SGE, case.plan
    found = tree_attention(*arguments, is_invariant=is_invariant, **options)
    half = case.query_THE.dtype != torch.float32
    # Weights are rounded to the values' dtype before they meet values of order one, which may cancel: the error is absolute.
    tolerance = {"rtol": 0.016, "atol": 2**-6} if half else {}
    torch.testing.assert_close(found, wanted(case, monkeypatch, **options), **tolerance)


OPTIONS = {
    "plain": {},
    "window": {"window": 5},
    "long window": {"window": 100},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks_H": torch.linspace(-2, 3, 6, device=DEVICE)},
    "all": {"window": 70, "softcap": 0.7, "sinks_H": torch.linspace(2, -3, 6, device=DEVICE)},
}


@pytest.mark.parametrize("is_invariant", [False, True], ids=["fast", "invariant"])
@pytest.mark.parametrize("name", OPTIONS)
def test_windows_caps_and_sinks(name, is_invariant, monkeypatch):
    case = make_case((6, 2, 13, 7), RAGGED, False, torch.float32, seed=2)
    check(case, monkeypatch, is_invariant, scaling=0.9, **OPTIONS[name])


# Query heads, kv heads, key size, value size.
SHAPES = [
    (1, 1, 64, 64),
    (9, 3, 64, 64),
    (8, 2, 40, 40),
    (8, 1, 80, 80),
    (4, 1, 128, 128),
    (3, 3, 256, 256),
    (20, 1, 24, 9),
]


@pytest.mark.parametrize("is_invariant", [False, True], ids=["fast", "invariant"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_of_heads(shape, is_invariant, monkeypatch):
    parts = [(5, 5, 70), (1, None, 20), (6, None, 0)]
    check(make_case(shape, parts, False, torch.float32, seed=3), monkeypatch, is_invariant, scaling=0.2)


@pytest.mark.parametrize("is_invariant", [False, True], ids=["fast", "invariant"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(8, 2, 40, 40), (9, 3, 128, 128)], ids=str)
def test_half_precision(shape, dtype, is_invariant, monkeypatch):
    parts = [(5, 5, 70), (1, None, 20), (6, None, 0)]
    check(make_case(shape, parts, True, dtype, seed=3), monkeypatch, is_invariant, scaling=0.2)


@pytest.mark.parametrize("num_splits", [1, 3, 7])
@pytest.mark.parametrize("name", ["plain", "window", "all"])
def test_splits_without_keys(name, num_splits, monkeypatch):
    """Short sequences beside a long one, windows that begin late: some splits see nothing at all."""
    case = on_device(make_case((6, 2, 16, 16), [(2, 3, 0), (3, None, 300), (4, 4, 30)], False, torch.float32, seed=4))
    options = {"window": None, "softcap": None, "sinks_H": None} | OPTIONS[name]
    found = tree_attention_triton(
        case.query_THE,
        case.keys_SGE,
        case.values_SGE,
        case.plan.batched(),
        1.1,
        launch=Launch(16, 32, num_splits, 4, 3),
        **options,
    )
    torch.testing.assert_close(found, wanted(case, monkeypatch, scaling=1.1, **options))
