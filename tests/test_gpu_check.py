"""`specdec gpu_check` in small, on the CPU: what it checks, what it measures, and that it does not measure what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import make_tiny
from head_cases import eagle_config

from specdec import cli
from specdec.drafters.heads import EagleHead
from specdec.drafters.heads.formats import save_head
from specdec.experiments import gpu_check, gpu_kernels, gpu_sampling
from specdec.experiments.gpu_aims import aims_of
from specdec.experiments.gpu_kernels import CHECKS, check_kernels
from specdec.experiments.gpu_measures import device_seconds, trees, wall_seconds
from specdec.experiments.kernel_check import SMALL, Sizes
from specdec.kernels.acceptance import AcceptedPath
from specdec.model import PagedModel
from specdec.noise import CounterNoise
from specdec.verifiers import Follow, Rejection

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_layers": 3,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_size": 16,
    "vocab_size": 300,
}
RESULT_FIELDS = set(
    """experiment system target drafter policy rule num_nodes prompts temperature batch_size dtype device tau tokens_per_s
    plain_tokens_per_s speedup efficiency lossless command revision versions date""".split()  # noqa: SIM905
)


@pytest.fixture(autouse=True)
def wide(monkeypatch) -> None:
    """Tables are not wrapped."""
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture(scope="module")
def words(tokenizer, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    model = make_tiny(vocab_size=len(tokenizer), max_position_embeddings=512)
    model.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    save_head(EagleHead(eagle_config(PagedModel(model), 3, draft_vocab_size=40)), folder / "head")
    return [
        "gpu_check",
        "target=hf",
        f"target.path={folder}/tiny",
        "target.device=cpu",
        f"draft={folder}/head",
        *(f"shape.{name}={value}" for name, value in SHAPE.items()),
        "contexts=[16,40,4000]",
        "batch_sizes=[1,2]",
        "num_nodes=5",
        "max_new_tokens=6",
        "repeats=1",
        "copy_mib=1",
        "small=true",
        "limit=2",
    ]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_all_parts_in_small(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*words, "output=gpu.jsonl"]) == 0
    out = capsys.readouterr().out
    for told in (
        "tree_attention float16",
        "invariant attention bfloat16",
        "text: drafter=ngram",
        "text: drafter=ngram drafter/policy=chain rule=rejection",
        "text at temperature 1: drafter=eagle",
        "rounding: drafter=eagle",
    ):
        assert told in " ".join(out.split())
    assert "these times are a CPU's" in out
    rows = rows_of(Path("gpu.jsonl"))
    assert all(row["is_gpu"] is False and row["experiment"] == "gpu_check" and row["aims"] == {} for row in rows)
    by = {measure: [row for row in rows if row["measure"] == measure] for measure in ("copy", "attention", "forward")}
    assert len(by["copy"]) == 1
    # Contexts that the model has no positions for are left out of its forwards.
    assert [(row["batch_size"], row["context"]) for row in by["forward"]] == [(1, 16), (1, 40), (2, 16), (2, 40)]
    assert all(row["stand_in"] is True and row["shape"] == SHAPE for row in by["forward"])
    assert len(by["attention"]) == 2 * 3 * 2
    decoded = [row for row in rows if row["measure"] == "decode"]
    assert len(decoded) == 2 * 2 * 3
    for row in decoded:
        assert set(row) >= RESULT_FIELDS
        assert row["speedup"] == 1 or row["drafter"] != "plain"
        assert row["efficiency"] == pytest.approx(row["speedup"] / row["tau"])
    assert {row.get("stand_in", False) for row in decoded} == {False, True}
    assert {row["drafter"].partition("(")[0] for row in decoded} == {"plain", "ngram", "eagle"}


def test_on_a_cpu_no_rows_are_written_unless_asked_for(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*words, "parts=[bandwidth]"]) == 0
    assert not list(tmp_path.rglob("*.jsonl"))


def test_nothing_is_measured_where_a_check_fails(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    honest = gpu_kernels.tree_attention
    monkeypatch.setattr(gpu_kernels, "tree_attention", lambda *args, **options: honest(*args, **options) * 1.01)
    assert cli.main([*words, "parts=[kernels,bandwidth]", "output=gpu.jsonl"]) == 1
    found = capsys.readouterr()
    assert "FAILED" in found.out
    assert "nothing is measured" in found.err
    assert not Path("gpu.jsonl").exists()


def _drawn_wrongly(honest, when):
    """A rule whose random numbers are those of other seeds for trees that `when` names."""

    def call(self, tree, laws, noise):
        size = tree.batch_size
        other = CounterNoise(range(1000, 1000 + size), [7] * size, [11] * size)
        return honest(self, tree, laws, other if when(tree) else noise)

    return call


def test_text_that_is_drawn_wrongly_is_found(words, tmp_path, monkeypatch, capsys):
    """It is right when it is greedy; of `follow` wherever something is drafted, of `rejection` in company."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Follow, "__call__", _drawn_wrongly(Follow.__call__, lambda tree: tree.max_nodes > 1))
    monkeypatch.setattr(Rejection, "__call__", _drawn_wrongly(Rejection.__call__, lambda tree: tree.batch_size > 1))
    assert cli.main([*words, "parts=[text]", "systems=['drafter=eagle']"]) == 1
    told = " ".join(word for word in capsys.readouterr().out.replace("│", " ").split())
    greedy, drawn = told.split("text at temperature 1", 1)
    assert "FAILED" not in greedy
    assert drawn.count("FAILED") == 4


def attention(**changes: object) -> dict:
    return {"measure": "attention", "is_gpu": True, "context": 4096, "share_of_copy": 0.9} | changes


def decoding(**changes: object) -> dict:
    return {"measure": "decode", "is_gpu": True, "stand_in": True, "cuda_graphs": True, "host_share": 0.01} | changes


@pytest.mark.parametrize(
    ("row", "aims"),
    [
        (attention(), {"share_of_copy >= 0.85": "passed"}),
        (attention(share_of_copy=0.849), {"share_of_copy >= 0.85": "missed"}),
        (attention(context=1024, share_of_copy=0.2), {}),
        (attention(is_gpu=False), {}),
        (decoding(), {"host_share < 0.03": "passed"}),
        (decoding(host_share=0.03), {"host_share < 0.03": "missed"}),
        (decoding(cuda_graphs=False, host_share=0.5), {}),
        (decoding(stand_in=None, host_share=0.5), {}),
        (decoding(is_gpu=False, host_share=None), {}),
        ({"measure": "forward", "is_gpu": True, "verify_ratio": 1.2}, {}),
    ],
)
def test_aims(row: dict, aims: dict[str, str]) -> None:
    assert aims_of(row) == aims


def test_a_missed_aim_is_told_and_fails_nothing(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_check, "aims_of", lambda row: aims_of(row | {"is_gpu": True}))
    monkeypatch.setattr(gpu_check, "attention_bandwidth", lambda *given: 0.8 * 1e9)
    monkeypatch.setattr(gpu_check, "copy_bandwidth", lambda *given: 1e9)
    assert cli.main([*words, "parts=[bandwidth]", "contexts=[40,4096]", "batch_sizes=[1]", "output=gpu.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "share_of_copy >= 0.85: missed" in " ".join(out.split())
    assert "of 2 aims 0 passed, 2 missed" in out
    outcomes = [row["aims"] for row in rows_of(Path("gpu.jsonl"))]
    assert outcomes == [{}, {}, {}] + [{"share_of_copy >= 0.85": "missed"}] * 2


def test_attention_kernels_are_checked_in_every_dtype_and_with_long_heads(monkeypatch):
    """Interpreted, where no device runs them."""
    pytest.importorskip("triton")
    monkeypatch.setenv("SPECDEC_KERNELS", "triton")
    assert all((256 in {size for _, _, size in sizes.heads}) for sizes in (SMALL, Sizes()))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checks = [check for op in ("tree_attention", "kv_write", "path_commit") for check in CHECKS[op](device, SMALL)]
    names = ("tree_attention", "invariant attention", "kv_write", "path_commit")
    dtypes = ("float32", "bfloat16", "float16")
    assert [one.name for one in checks] == [f"{name} {dtype}" for name in names for dtype in dtypes]
    assert all(one.passed for one in checks)


def test_ops_without_a_kernel_or_a_check_are_named(monkeypatch):
    monkeypatch.setattr(gpu_kernels, "OPS", ("tree_attention", "levitation"))
    monkeypatch.setattr(gpu_kernels, "CHECKS", {})
    checks = {one.name: one for one in check_kernels(torch.device("cpu"), SMALL)}
    assert checks["levitation"].detail.startswith("missing")
    assert checks["tree_attention"].detail == "there is a kernel, but no check of it here"
    assert not any(one.passed for one in checks.values())


def test_every_kernel_of_the_device_is_checked():
    checks = check_kernels(torch.device("cpu"), SMALL)
    assert all(one.passed for one in checks if one.passed is not None)
    for op in gpu_kernels.OPS:
        assert [one.passed for one in checks if one.name.startswith(op)].count(True)
    assert sum(one.name.startswith("acceptance") for one in checks) == 8


@pytest.mark.parametrize("op", ["laws", "draw", "sample"])
def test_a_wrong_sampling_kernel_is_found(monkeypatch, op: str):
    honest = getattr(gpu_sampling.sampling, op)

    def wrong(rows, *given):
        return honest(rows.roll(1, -1), *given)

    monkeypatch.setattr(gpu_sampling.sampling, op, wrong)
    failed = {one.name for one in gpu_sampling.check_sampling(torch.device("cpu"), SMALL) if not one.passed}
    assert failed and all(name.startswith(f"sampling {op}") for name in failed)


@pytest.mark.parametrize("rule", ["follow", "rejection", "traversal"])
def test_a_wrong_walk_is_found(monkeypatch, rule: str):
    honest = getattr(gpu_sampling.acceptance, rule)

    def wrong(*given):
        right = honest(*given)
        return AcceptedPath(right.path_BN, right.num_accepted_B, right.next_token_B.roll(1))

    monkeypatch.setattr(gpu_sampling.acceptance, rule, wrong)
    checks = gpu_sampling.check_acceptance(torch.device("cpu"), SMALL)
    assert all(one.passed == (not one.name.startswith(f"acceptance {rule},")) for one in checks)


def test_unknown_parts_are_refused(words, capsys):
    assert cli.main([*words, "parts=[kernels,speed]"]) == 2
    assert "parts=['speed'] are unknown" in capsys.readouterr().err


def test_trees_that_are_timed():
    pool, segments = trees(3, 7, 20, torch.device("cpu"))
    pool.check(segment.table for segment in segments)
    assert segments[0].tail_mask_QM is not None
    assert segments[0].tail_mask_QM.sum(1).tolist() == [1, 2, 2, 3, 3, 3, 3]
    assert segments[0].positions_Q.tolist() == [20, 21, 21, 22, 22, 22, 22]
    assert trees(1, 1, 20, torch.device("cpu"))[1][0].tail_mask_QM is None


def test_timers_run_what_they_time():
    calls: list[int] = []
    assert wall_seconds(lambda: calls.append(1), torch.device("cpu"), 2) >= 0
    assert device_seconds([lambda: calls.append(2)] * 3, torch.device("cpu"), 2) >= 0
    assert calls.count(1) == 5
    assert calls.count(2) == 15
