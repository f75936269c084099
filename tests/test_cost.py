"""The cost model: what it is fitted to it predicts, what it sees it follows, what it wrote it reads."""

from __future__ import annotations

import json

import numpy as np
import pytest

from specdec.cost import CostModel, DraftCost, DraftSize, TargetCost, TargetSize

KNOTS = (1, 4, 16, 64)


def truth(size: TargetSize) -> float:
    curve = float(np.interp(size.num_rows, KNOTS, (0.04, 0.041, 0.06, 0.2)))
    pairs = size.num_rows * size.context / size.num_sequences
    return curve + 0.002 * (size.num_sequences - 1) + 1e-6 * size.context + 1e-7 * pairs


def draft_truth(size: DraftSize) -> float:
    return 0.001 + 0.003 * size.num_levels + 1e-4 * size.num_nodes + 5e-5 * size.num_caught_up


SIZES = [
    *(TargetSize(rows, 1, 20) for rows in KNOTS),
    TargetSize(16, 4, 80),
    TargetSize(64, 4, 80),
    TargetSize(1, 1, 500),
    TargetSize(64, 1, 500),
]
DRAFTS = [DraftSize(1, 1, 1), DraftSize(5, 17, 3), DraftSize(5, 68, 12), DraftSize(1, 4, 40), DraftSize(3, 9, 2)]


@pytest.fixture
def model() -> CostModel:
    target = TargetCost.fit([(size, truth(size)) for size in SIZES])
    return CostModel(target, DraftCost.fit([(size, draft_truth(size)) for size in DRAFTS]))


def test_the_fit_predicts_what_was_not_measured(model: CostModel) -> None:
    for size in (TargetSize(8, 2, 100), TargetSize(40, 4, 400), TargetSize(2, 1, 300)):
        found = float(model.step_s(np.array(float(size.num_rows)), size.num_sequences, size.context))
        assert found == pytest.approx(truth(size), rel=0.02)
    for draft in (DraftSize(2, 8, 2), DraftSize(4, 50, 9)):
        sizes = (np.array(float(n)) for n in (draft.num_levels, draft.num_nodes, draft.num_caught_up))
        assert float(model.draft_s(*sizes)) == pytest.approx(draft_truth(draft), rel=0.02)


def test_more_never_costs_less_whatever_was_measured() -> None:
    noisy = [(TargetSize(n), s) for n, s in ((1, 0.05), (2, 0.04), (4, 0.06), (8, 0.045), (16, 0.08))]
    model = CostModel(TargetCost.fit(noisy), DraftCost.fit([(DraftSize(1, 1), 0.002), (DraftSize(3, 3), 0.001)]))
    seconds = model.step_s(np.arange(1.0, 40.0), 1, 0)
    assert (np.diff(seconds) >= 0).all() and seconds[-1] > seconds[15]
    assert float(model.draft_s(*np.zeros((3, 1)))[0]) == 0


def test_a_slower_machine_is_followed_at_sizes_never_seen(model: CostModel) -> None:
    before = model.step_s(np.array([1.0, 16.0, 64.0]), 1, 20)
    for _ in range(60):
        model.observe_step(TargetSize(4, 1, 20), 2 * truth(TargetSize(4, 1, 20)))
    after = model.step_s(np.array([1.0, 4.0, 16.0, 64.0]), 1, 20)
    assert after[1] == pytest.approx(2 * truth(TargetSize(4, 1, 20)), rel=0.05)
    assert (after[[0, 2, 3]] > 1.3 * before).all()


def test_what_grows_with_the_tree_is_learned_where_it_is_seen(model: CostModel) -> None:
    plain, tree = TargetSize(1, 1, 20), TargetSize(64, 1, 20)
    for _ in range(300):
        model.observe_step(plain, truth(plain))
        model.observe_step(tree, 1.5 * truth(tree))
    found = model.step_s(np.array([1.0, 64.0]), 1, 20)
    assert found == pytest.approx([truth(plain), 1.5 * truth(tree)], rel=0.05)


def test_one_pause_of_the_machine_moves_little(model: CostModel) -> None:
    size = TargetSize(4, 1, 20)
    before = float(model.step_s(np.array(4.0), 1, 20))
    model.observe_step(size, 100.0)
    assert float(model.step_s(np.array(4.0), 1, 20)) < 1.2 * before


def test_a_draft_is_corrected_against_the_target(model: CostModel) -> None:
    size = DraftSize(3, 9, 2)
    for _ in range(200):
        model.observe_draft(size, 3 * draft_truth(size))
    found = float(model.draft_s(np.array(3.0), np.array(9.0), np.array(2.0)))
    assert found == pytest.approx(3 * draft_truth(size), rel=0.05)


def test_calibration_survives_the_disk_and_nothing_else_is_read(model: CostModel) -> None:
    again = CostModel.from_dict(json.loads(json.dumps(model.to_dict())))
    assert again.target == model.target and again.draft == model.draft
    for read in ({}, {"target": {"knots": [1]}, "draft": {}}, {"target": 3, "draft": 4}, [1]):
        with pytest.raises(ValueError, match="no cost model"):
            CostModel.from_dict(read)
    with pytest.raises(ValueError, match="no step was measured"):
        TargetCost.fit([])
