"""Training of heads: losses against their definitions, packing, the unroll, the loop and its resumption."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.nn.functional import cross_entropy, smooth_l1_loss

from specdec.drafters.training.attention import UnrollAttention, packed_attention
from specdec.drafters.training.cross_entropy import linear_cross_entropy
from specdec.drafters.training.initial import new_eagle, new_medusa
from specdec.drafters.training.interrupts import interrupted_after
from specdec.drafters.training.joint import MedusaJointObjective
from specdec.drafters.training.loop import Callbacks, Trainer, checkpoints
from specdec.drafters.training.objectives import Eagle1Objective, Eagle3Objective, MedusaObjective
from specdec.drafters.training.params import TrainingParams
from specdec.drafters.training.records import Record, RecordSet, RecordWriter
from specdec.drafters.training.rows import Row, RowSchedule, plan_rows
from specdec.drafters.training.target import TrainingTarget
from specdec.drafters.training.vocabulary import coverage, most_frequent, token_counts
from specdec.model import PagedModel

VOCAB = 97


def texts(count: int, seed: int = 0, shortest: int = 5, longest: int = 14) -> list[Record]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        length = int(torch.randint(shortest, longest, (1,), generator=generator))
        tokens = torch.randint(3, VOCAB, (length,), generator=generator)
        found.append(Record(tokens, torch.arange(length) >= 2, i + 1000 * seed))
    return found


@pytest.fixture(scope="module")
def target(tiny) -> TrainingTarget:
    return TrainingTarget(PagedModel(tiny()))


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state(*([True] if state is AcceleratorState else []))


def make_objective(kind: str, target: TrainingTarget):
    ids = torch.arange(3, 80)
    if kind == "medusa":
        return MedusaObjective(new_medusa(target, 3), target)
    if kind == "medusa_shared":
        return MedusaObjective(new_medusa(target, 3, own_lm_head=False), target)
    if kind == "eagle1":
        return Eagle1Objective(new_eagle(target, 1, seed=5), target)
    layers = (0, 1, 2)
    return Eagle3Objective(new_eagle(target, 3, 5, None if kind == "eagle3" else ids, layers), target, num_steps=3)


KINDS = ["medusa", "medusa_shared", "eagle1", "eagle3", "eagle3_reduced"]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_linear_cross_entropy_is_the_plain_one(soft: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(shape, generator=generator, dtype=dtype) for shape in [(7, 4), (11, 4), (11,)])
    scale = torch.rand(7, generator=generator, dtype=dtype)
    logits = torch.randn(7, 11, generator=generator, dtype=dtype)
    ids = torch.randint(11, (7,), generator=generator)
    results = []
    for ours in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if ours:
            out = linear_cross_entropy(
                h, w, (lambda part: logits[part]) if soft else ids, scale, bias, chunk_numbers=24
            )
            loss, correct = out.loss, out.correct_M
        else:
            mine = h @ w.T + bias
            loss = (cross_entropy(mine, logits.softmax(-1) if soft else ids, reduction="none") * scale).sum()
            correct = mine.argmax(-1) == (logits.argmax(-1) if soft else ids)
        (3 * loss).backward()
        results.append((loss.detach(), h.grad, w.grad, correct))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_rows_know_their_texts() -> None:
    row = Row.of([Record(torch.tensor([5, 6, 7]), torch.tensor([0, 1, 1]).bool(), 0), *texts(1)])
    assert row.positions_T[:4].tolist() == [0, 1, 2, 0]
    assert row.is_learnt(1)[:4].tolist() == [True, True, False, False]
    assert row.is_learnt(2)[:3].tolist() == [True, False, False]
    assert row.ahead(1)[:2].tolist() == [6, 7]


def test_every_record_is_in_one_row_of_an_epoch() -> None:
    lengths = [len(one.token_ids_T) for one in texts(50)]
    rows = plan_rows(lengths, 40, seed=1, epoch=3)
    assert sorted(i for row in rows for i in row) == list(range(50))
    assert all(sum(lengths[i] for i in row) <= 40 for row in rows)
    assert rows == plan_rows(lengths, 40, seed=1, epoch=3) != plan_rows(lengths, 40, seed=1, epoch=4)
    whole, late = RowSchedule(lengths, 40, 3, seed=1), RowSchedule(lengths, 40, 3, seed=1)
    steps = [whole.step(i) for i in range(20)]
    assert [late.step(i) for i in range(9, 20)] == steps[9:]
    with pytest.raises(ValueError, match="a step takes 100"):
        RowSchedule(lengths, 40, 100, seed=1)


def test_target_states_are_transformers_own(target, tiny) -> None:
    row = Row.of(texts(3))
    states = target([], row, (0, 1, 2))
    plain, start = tiny(), 0
    for length in row.lengths:
        part = slice(start, start + length)
        with torch.no_grad():
            out = plain(row.token_ids_T[None, part], output_hidden_states=True)
        for layer in (0, 1, 2):
            torch.testing.assert_close(states[layer][part], out.hidden_states[layer][0])
        torch.testing.assert_close(target.lm_head(states[2][part]), out.logits[0])
        start += length


@pytest.mark.parametrize("kind", KINDS)
def test_packing_changes_nothing(kind: str, target) -> None:
    """The loss and gradient of a row are the sums of those of its texts alone."""
    objective = make_objective(kind, target).eval()
    records = [one for one in texts(4) if len(one.token_ids_T) > 3]
    results = []
    for rows in ([records], [[one] for one in records]):
        objective.zero_grad()
        outs = []
        for row in map(Row.of, rows):
            out = objective(row, target([], row, objective.layers), 0)
            out["loss"].backward()
            outs.append(out)
            assert objective.num_targets(row) == out["count_K"][0]
        sums = {name: sum(_padded(out[name].detach().double(), 3) for out in outs) for name in outs[0]}
        results.append((sums, [one.grad.clone() for one in objective.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def _padded(values: torch.Tensor, size: int) -> torch.Tensor:
    return values if values.ndim == 0 else torch.nn.functional.pad(values, (0, size - len(values)))


def test_medusa_loss_is_the_paper_s(target) -> None:
    objective = make_objective("medusa", target)
    for parameter in objective.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    record = texts(1, longest=6)[0]
    row = Row.of([record])
    hidden = target([], row, (2,))[2]
    logits = objective.head.logits(hidden)
    expected, length = 0.0, len(record.token_ids_T)
    for k in range(1, 4):
        for t in range(length):
            if t + k + 1 < length and record.loss_mask_T[t + k + 1]:
                expected -= 0.8**k * logits[k - 1, t].log_softmax(-1)[record.token_ids_T[t + k + 1]]
    torch.testing.assert_close(objective(row, {2: hidden}, 0)["loss"], expected)


def test_eagle1_loss_is_the_paper_s(target) -> None:
    objective = make_objective("eagle1", target).eval()
    record = texts(1)[0]
    row = Row.of([record])
    features = target([], row, (2,))[2]
    out = objective.head(
        target.embed(row.ahead(1)), features, row.positions_T, lambda q, k, v: packed_attention(q, k, v, row.lengths)
    )
    expected = 0.0
    for t in range(len(record.token_ids_T) - 2):
        if record.loss_mask_T[t + 2]:
            expected += smooth_l1_loss(out[t], features[t + 1])
            law = target.lm_head(features[t + 1]).softmax(-1)
            expected -= 0.1 * (law * target.lm_head(out[t]).log_softmax(-1)).sum()
    torch.testing.assert_close(objective(row, {2: features}, 0)["loss"], expected)
    noisy = objective.train()(row, {2: features}, 1)["loss"]
    assert noisy != expected
    assert noisy == objective(row, {2: features}, 1)["loss"] != objective(row, {2: features}, 2)["loss"]


def test_eagle3_unroll_is_a_chain_of_drafts(target) -> None:
    """Step k behind token t sees the true features up to t and its own outputs behind them: here run text by text."""
    objective = make_objective("eagle3", target)
    head, records = objective.head, texts(3)
    row = Row.of(records)
    states = target([], row, objective.layers)
    steps = objective.unroll(row, states)
    start = 0
    for record in records:
        length = len(record.token_ids_T)
        fused = head.fuse([states[layer][start : start + length] for layer in (0, 1, 2)])
        for t in range(length - 4):
            keys: list[torch.Tensor] = []
            values: list[torch.Tensor] = []

            def attend(query, key, value, keys=keys, values=values):
                keys.append(key)
                values.append(value)
                past = sum(len(one) for one in keys[:-1])
                mask = torch.ones(len(query), past + len(query)).tril(past).bool()
                whole = [torch.cat(one).repeat_interleave(2, 1).transpose(0, 1) for one in (keys, values)]
                return torch.nn.functional.scaled_dot_product_attention(
                    query.transpose(0, 1), *whole, attn_mask=mask
                ).transpose(0, 1)

            tokens = record.token_ids_T
            out = head(target.embed(tokens[1 : t + 2]), fused[: t + 1], torch.arange(t + 1), attend)[-1:]
            for k, (hidden_MD, tokens_M) in enumerate(steps):
                if k:
                    out = head(target.embed(tokens[t + 1 + k, None]), out, torch.tensor([t + k]), attend)
                place = (tokens_M == start + t).nonzero()
                if len(place):
                    torch.testing.assert_close(hidden_MD[place[0]], out, rtol=1e-4, atol=1e-4)
                else:
                    assert k and not objective.is_learnt(row, k + 2)[start + t]
        start += length


def test_eagle3_loss_over_a_reduced_vocabulary(target) -> None:
    objective = make_objective("eagle3_reduced", target)
    row = Row.of(texts(3))
    states = target([], row, objective.layers)
    ids = objective.head.draft_to_target_R
    expected = 0.0
    for k, (hidden_MD, tokens_M) in enumerate(objective.unroll(row, states)):
        for out, t in zip(hidden_MD, tokens_M.tolist(), strict=True):
            if row.is_learnt(k + 2)[t] and row.token_ids_T[t + k + 2] in ids:
                law = target.lm_head(states[2][t + k + 1])[ids].softmax(-1)
                expected -= 0.8**k * (law * objective.head.logits(out[None])[0].log_softmax(-1)).sum()
    torch.testing.assert_close(objective(row, states, 0)["loss"], expected)


def test_unroll_attention_with_texts_that_go_no_further() -> None:
    attention = UnrollAttention([2, 3, 1])
    first = torch.randn(6, 2, 4), torch.randn(6, 1, 4), torch.randn(6, 1, 4)
    attention(*first)
    attention.select(torch.tensor([3]))
    query, key, value = torch.randn(1, 2, 4), torch.randn(1, 1, 4), torch.randn(1, 1, 4)
    keys, values = torch.cat([first[1][2:4], key])[:, 0], torch.cat([first[2][2:4], value])[:, 0]
    weights = (query[0] @ keys.T / 2).softmax(-1)
    torch.testing.assert_close(attention(query, key, value), (weights @ values)[None])


def test_the_vocabulary_is_the_most_frequent(tmp_path: Path) -> None:
    data = make_data(
        tmp_path / "data", [Record(torch.tensor([9, 9, 4, 4, 4, 7]), torch.tensor([0, 0, 1, 1, 1, 1]).bool(), 1)]
    )
    counts = token_counts(data, 12)
    assert counts.tolist() == [0, 0, 0, 0, 3, 0, 0, 1, 0, 0, 0, 0]
    ids = most_frequent(counts, 3)
    assert ids.tolist() == [0, 4, 7]
    # Among tokens that are never to be learnt those of an earlier vocabulary come first, but not before one that is.
    assert most_frequent(counts, 4, torch.tensor([3, 11])).tolist() == [3, 4, 7, 11]
    assert most_frequent(counts, 2, torch.tensor([3, 11])).tolist() == [4, 7]
    assert coverage(counts, torch.tensor([4])) == 0.75
    with pytest.raises(ValueError, match="holds token 7"):
        token_counts(data, 5)
    with pytest.raises(ValueError, match="draft_vocab_size=13"):
        most_frequent(counts, 13)


def make_data(folder: Path, records: list[Record], split: str = "train") -> RecordSet:
    writer = RecordWriter(folder, {}, {})
    writer.commit(records, {})
    writer.flush()
    return RecordSet(folder, split)


def make_trainer(kind: str, target: TrainingTarget, data: RecordSet, folder: Path, **params) -> Trainer:
    settings = {"num_steps": 6, "row_tokens": 40, "rows_per_step": 2, "warmup_steps": 2, "learning_rate": 1e-2} | params
    return Trainer(
        make_objective(kind, target),
        target,
        data,
        TrainingParams(**settings),
        folder,
        {"kind": kind},
        Accelerator(cpu=True),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_held_out_loss(kind: str, target, tmp_path: Path) -> None:
    records = texts(30)
    data = make_data(tmp_path / "data", records)
    trainer = make_trainer(kind, target, data, tmp_path / "run", num_steps=30)
    before = trainer.validate(data)
    rows: list[dict] = []
    progress = trainer.run(Callbacks(on_row=rows.append), data)
    after = rows[-1]
    assert after["kind"] == "eval" and after["is_best"] and progress.best_score == -after["loss"]
    assert after["loss"] < 0.95 * before["loss"]
    assert {row["kind"] for row in rows} == {"train", "eval"}
    assert all(0 <= row["accuracy_1"] <= 1 and row["grad_norm"] >= 0 for row in rows[:-1])
    assert [row["step"] for row in rows] == [10, 20, 30, 30]
    # Two rows of at most 40 tokens, or of one longer text, in each step.
    assert rows[-1]["num_tokens"] == sum(
        len(data[i].token_ids_T) for step in range(30) for row in trainer._schedule.step(step) for i in row
    )


class Stop(KeyboardInterrupt):
    pass


@pytest.mark.parametrize(
    ("kind", "rates"),
    [("medusa", {}), ("eagle1", {}), ("eagle3_reduced", {}), ("eagle3_reduced", {"matrix_rate": 1e-2})],
)
def test_a_stopped_training_goes_on_as_if_it_had_not_been(kind: str, rates: dict, target, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", texts(30))
    whole = make_trainer(kind, target, data, tmp_path / "whole", **rates)
    whole.run(held_out=data)

    def stop(step: int) -> None:
        if step == 3:
            raise Stop

    first = make_trainer(kind, target, data, tmp_path / "parts", eval_every=0, **rates)
    with pytest.raises(Stop):
        first.run(Callbacks(on_step=stop))
    assert [one.name for one in checkpoints(tmp_path / "parts")] == ["step-3"]
    again = make_trainer(kind, target, data, tmp_path / "parts", **rates)
    assert again.progress.step == 3
    again.run(held_out=data)
    assert again.progress == whole.progress
    for (name, one), other in zip(
        again.objective.state_dict().items(), whole.objective.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    with pytest.raises(ValueError, match=r"training with learning_rate=0\.01, not 0\.5"):
        make_trainer(kind, target, data, tmp_path / "parts", **rates, learning_rate=0.5)


def test_muon_moves_the_matrices_alone(target, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", texts(30))
    objective = make_objective("eagle3_reduced", target)
    before = copy.deepcopy(objective.state_dict())
    params = TrainingParams(num_steps=4, row_tokens=60, learning_rate=1e-9, matrix_rate=1e-2)
    Trainer(objective, target, data, params, tmp_path / "run", {}, Accelerator(cpu=True)).run()
    moved = {name for name, one in objective.state_dict().items() if not torch.allclose(one, before[name], atol=1e-6)}
    assert moved == {name for name, one in before.items() if one.ndim == 2 and "lm_head" not in name}


def test_a_stopped_evaluation_is_made_up_for(target, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", texts(30))

    def interrupted(state: object) -> dict[str, float]:
        raise Stop

    trainer = make_trainer("medusa", target, data, tmp_path / "run", eval_every=2)
    with pytest.raises(Stop):
        trainer.run(Callbacks(evaluate=interrupted))
    seen: list[int] = []
    again = make_trainer("medusa", target, data, tmp_path / "run", eval_every=2)
    again.run(Callbacks(evaluate=lambda state: {"tau": 1.0}, on_row=lambda row: seen.append(row["step"])))
    assert seen == [2, 4, 6, 6]
    # Done, evaluations included: asked again, it does nothing.
    make_trainer("medusa", target, data, tmp_path / "run", eval_every=2).run(Callbacks(evaluate=interrupted))


def test_texts_too_short_for_the_later_steps(target) -> None:
    objective = make_objective("eagle3", target)
    for length, counts in ((2, [0, 0, 0]), (3, [1, 0, 0]), (4, [2, 1, 0])):
        row = Row.of([Record(torch.arange(3, 3 + length), torch.ones(length, dtype=torch.bool), 0)])
        out = objective(row, target([], row, objective.layers), 0)
        assert out["count_K"].tolist() == counts
        assert out["loss_K"].shape == out["correct_K"].shape == (3,)
        out["loss"].backward()


def test_training_stops_when_tau_no_longer_rises(target, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", texts(30))
    trainer = make_trainer("eagle1", target, data, tmp_path / "run", num_steps=20, eval_every=2, patience=2)
    taus, best = iter([1.5, 2.0, 1.9, 2.0, 3.0]), []
    calls = Callbacks(evaluate=lambda state: {"tau": next(taus)}, on_best=lambda state: best.append(set(state)))
    progress = trainer.run(calls)
    assert (progress.step, progress.best_step, progress.best_score, progress.stopped_early) == (8, 4, 2.0, True)
    assert best == [set(trainer.objective.state_dict())] * 2
    # Stopped for good: asked again, it does nothing.
    again = make_trainer("eagle1", target, data, tmp_path / "run", num_steps=20, eval_every=2, patience=2)
    assert again.run(calls) == progress


def test_rows_of_a_step_add_up_to_one_row(target, tmp_path: Path) -> None:
    """Accumulating gradients over rows weighs tokens, not rows: two rows are their texts in one."""
    data = make_data(tmp_path / "data", texts(4, longest=20))
    total = sum(data.lengths)
    weights = []
    for rows_per_step, row_tokens in ((1, total), (2, total * 2 // 3)):
        trainer = make_trainer(
            "eagle3", target, data, tmp_path / str(rows_per_step), num_steps=1, rows_per_step=rows_per_step,
            row_tokens=row_tokens, warmup_steps=0,
        )  # fmt: skip
        trainer.run()
        weights.append(trainer.objective.state_dict())
    for name, one in weights[0].items():
        torch.testing.assert_close(one, weights[1][name], rtol=1e-4, atol=1e-5)


def test_medusa_2_trains_heads_and_target(tiny, target, tmp_path: Path) -> None:
    model = tiny()
    model.set_attn_implementation("sdpa")
    before = copy.deepcopy(model.state_dict())
    objective = MedusaJointObjective(new_medusa(target, 2), model, warmup_steps=3)
    data = make_data(tmp_path / "data", texts(30))
    row = Row.of([data[0], data[1]])
    alone = [objective(one, {}, 0) for one in (Row.of([data[0]]), Row.of([data[1]]))]
    torch.testing.assert_close(objective(row, {}, 0)["loss"], alone[0]["loss"] + alone[1]["loss"])
    params = TrainingParams(num_steps=8, row_tokens=60, learning_rate=1e-3, log_every=4)
    trainer = Trainer(objective, target, data, params, tmp_path / "run", {}, Accelerator(cpu=True))
    rows: list[dict] = []
    trainer.run(Callbacks(on_row=rows.append))
    assert rows[1]["language"] < rows[0]["language"]
    assert any(not torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert [group["lr"] for group in trainer._optimizers[0].param_groups] == [
        pytest.approx(params.rate(7) * rate) for rate in (1e-3, 4e-3)
    ]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own handling of SIGINT, which a process started in the background ignores."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits_for_the_step_to_end(interruptible) -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupted_after():
        signal.raise_signal(signal.SIGINT)
        done.append("first")
    with pytest.raises(KeyboardInterrupt), interrupted_after():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("second")
    assert done == ["first"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_targets_that_training_does_not_understand_are_refused(tiny) -> None:
    with pytest.raises(ValueError, match="soft-capped or scaled"):
        TrainingTarget(PagedModel(tiny(architecture="gemma2", head_dim=8, final_logit_softcapping=1.0)))
    gpt2 = tiny(architecture="gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64)
    target = TrainingTarget(PagedModel(gpt2))
    with pytest.raises(ValueError, match="no single rotary embedding"):
        new_eagle(target, 1, seed=0)
    # Medusa asks for nothing but the last state and the LM head.
    row = Row.of(texts(2))
    objective = MedusaObjective(new_medusa(target, 2), target)
    assert objective(row, target([], row, objective.layers), 0)["loss"] > 0


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"num_steps": 0}, "num_steps=0"),
        ({"learning_rate": -1.0}, "learning_rate=-1"),
        ({"matrix_rate": 0.0}, "matrix_rate=0.0"),
        ({"betas": (1.0, 0.9)}, "betas"),
    ],
)
def test_values_out_of_range_are_named(values: dict, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        TrainingParams(**{"num_steps": 5, **values})


def test_the_rate_rises_and_falls() -> None:
    params = TrainingParams(num_steps=10, warmup_steps=4, final_rate=0.1)
    rates = [params.rate(step) for step in range(10)]
    assert rates[:4] == sorted(rates[:4]) and rates[4] == 1 and rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[9] > 0.1 and params.rate(10) == pytest.approx(0.1)
