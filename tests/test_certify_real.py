"""The parts of a certificate on a real model, as users run them, here on tiny ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import serves_invariant

from specdec import Engine, cli
from specdec.certificates.statistics import MIN_TOKENS
from specdec.experiments import certify, certify_real
from specdec.verifiers import Rejection, Threshold

IID = "drafter/policy=chain drafter.policy.depth=3 drafter.policy.kind=iid"


@pytest.fixture(scope="module")
def folder(tiny, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, noise in {"target": 0.0, "draft": 0.05}.items():
        tiny(vocab_size=len(tokenizer), noise=noise, max_position_embeddings=512).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch, capfd):
    """Certifies the tiny target; status, report, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("abcabc\nxyz\nhello\n")
    words = ["certify", "level=real", "target=hf", f"target.path={folder}/target", "prompt_file=p.txt", "chat=false"]
    words += [f"num_tokens={MIN_TOKENS}", "num_judged=2", "sampling.max_new_tokens=24", "sampling.ignore_eos=true"]
    words += ["engine.max_batch_size=32", "output=one.json", "work_dir=work"]

    def run(*more: str, systems: list[str], draft_systems: tuple[str, ...] = ()) -> tuple[int, Any, str, str]:
        chosen = [f"systems={json.dumps(systems)}", f"draft_systems={json.dumps(draft_systems)}"]
        status = cli.main([*words, *chosen, *more])
        report = json.loads(Path("one.json").read_text()) if Path("one.json").exists() else None
        return status, report, *capfd.readouterr()

    return run


def test_a_real_model_is_certified(run, folder: Path, monkeypatch) -> None:
    systems = ["drafter=ngram", "drafter=ngram rule=threshold rule.threshold=0.05 allow_lossy=true"]
    draft_systems = (f"drafter=small_model {IID} rule=rejection",)
    words = ("target.dtype=bfloat16", f"draft={folder}/draft")
    status, report, out, _ = run(*words, systems=systems, draft_systems=draft_systems)
    assert status == 0 and report["passed"] and report["rules"] == report["mutants"] == []
    names = ["plain", systems[0], *draft_systems]
    laws = [row for row in report["real"] if row["measured"] == "law"]
    assert [row["name"] for row in laws] == names and all(row["passed"] and row["lossless"] for row in laws)
    assert {(row["dtype"], row["target"], row["prompts"]) for row in laws} == {("float32", "target", "p")}
    assert all(row["smallest_p"] > row["threshold"] and row["num_tokens"] >= MIN_TOKENS for row in laws)
    assert [level["nominal"] for level in laws[0]["false_alarms"]["levels"]] == [0.05, 0.01]
    (biased,) = (row for row in report["real"] if row["measured"] == "bias")
    assert biased["name"] == systems[1] and not biased["lossless"] and biased["estimate"] == "exact"
    assert biased["kl_per_1k"] > 0 and biased["num_prompts"] == 3
    numerics = report["numerics"]
    assert numerics["passed"] and numerics["dtype"] == "bfloat16"
    # Greedy every lossless system has plain decoding's text; with chance those that follow it.
    assert [(row["name"], row["temperature"]) for row in numerics["rows"]] == [
        *((name, 0.0) for name in names[1:]),
        (systems[0], 1.0),
    ]
    is_invariant = serves_invariant()
    for row in numerics["rows"]:
        assert (
            row["numerics"] == ("invariant" if is_invariant else "fast")
            and row["referee_dtype"] == "float32"
            and row["num_prompts"] == 2
        )
        if is_invariant:
            assert row["near_ties"] == row["true_divergences"] == 0 and row["num_prompts_equal"] == 2
        assert {"near_ties_per_10k", "true_divergences_per_10k", "num_prompts_equal", "noise_rms"} <= set(row)
    for part in ("1.0% greedy tokens", "False alarms", "threshold LOSSY", "same text", "passed: one.json"):
        assert part in " ".join(out.split()), part
    # All of it is kept: the same again needs no text.
    monkeypatch.setattr(Engine, "generate", lambda *_, **__: pytest.fail("a text was generated again"))
    again = run(*words, systems=systems, draft_systems=draft_systems)[1]
    assert again["real"] == report["real"] and again["numerics"] == report["numerics"]


def test_a_wrong_system_fails(run, monkeypatch) -> None:
    wrong = Threshold(1e-9)
    monkeypatch.setattr(Rejection, "__call__", lambda self, *context: wrong(*context))
    status, report, out, _ = run(systems=[f"drafter=ngram {IID} rule=rejection"])
    assert status == 1 and not report["passed"] and "NOT PASSED" in out
    assert [row["passed"] for row in report["real"]] == [True, False]
    # In float32 the referee is in float64; greedy, keeping every drafted token is no matter of rounding.
    assert report["numerics"]["rows"][0]["referee_dtype"] == "float64"


def test_an_interrupted_run_says_how_to_go_on(run, monkeypatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(certify_real, "referee", stop)
    status, report, _, err = run(systems=["drafter=ngram"])
    assert status == 130 and report is None and "work_dir=work" in err
    assert Path("work/emitted.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["prompt_file=null"], "prompt_file=FILE"),
        (["num_tokens=10"], "num_tokens=10"),
        (["temperatures=[0.0]"], "temperatures=[0.0]"),
        (["sampling.temperature=0.5"], "temperatures=[...]"),
        (["dtype=int8"], "dtype=int8"),
        (["alpha=2"], "alpha=2"),
        (["num_judged=0"], "num_judged=0"),
        (["systems=['drafter=ngrm']"], "drafter=ngrm"),
        (["systems=['drafter=ngram rule=typical']"], "allow_lossy=true"),
        (["systems=['drafter=ngram rule=rejection']"], "rule=rejection is not exact"),
        (["systems=['drafter=small_model']"], "draft="),
        (["level=all", "systems=['drafter=ngram rule=typical']"], "allow_lossy=true"),
        (["level=reel"], "quick, full, real, all"),
    ],
)
def test_what_is_wrong_is_one_line(run, monkeypatch, words: list[str], part: str) -> None:
    monkeypatch.setattr(certify_real, "load_target", lambda config: pytest.fail("the model was loaded"))
    monkeypatch.setattr(certify, "_enumerated", lambda config: pytest.fail("rules were certified"))
    status, _, out, err = run(*words, systems=["drafter=ngram"])
    assert status == 2 and out == "" and err.count("\n") == 1 and part in err, err
