"""The command: errors in one line, free text as it was typed, rows as they finish."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from specdec import cli
from specdec.experiments import benchmark, generate
from specdec.tracking import JsonlTracker

ROOT = Path(__file__).resolve().parent.parent
ROW_FIELDS = {
    "prompt",
    "prompt_token_ids",
    "token_ids",
    "text",
    "seed",
    "finish_reason",
    "num_target_forwards",
    "tau",
    "tokens_per_s",
    "ttft_s",
    "itl_p50_s",
    "itl_p95_s",
    "itl_p99_s",
    "drafted_by_depth",
    "accepted_by_depth",
    "acceptance_by_depth",
}
RESULT_FIELDS = set(
    """experiment system target drafter policy rule num_nodes prompts temperature batch_size dtype device tau tokens_per_s
    plain_tokens_per_s speedup efficiency lossless command revision versions date""".split()  # noqa: SIM905
)
NASTY = [
    "Hello, (you) [and] {me}: 'a' = \"b\" ${x} $HOME \\${y} \\\\ ~!@#%^&*|;<>?`",
    "two\nlines\tand a tab\n",
    "'",
    "it's 'single' and",
    "null",
    "ends in a backslash \\",
    "'ends in a backslash \\\\'\\",
    "prompt=prompt=1,2,3",
    "grün, 日本語, \U0001f600",
    "${oc.env:HOME}",
    "",
]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPECDEC_DEBUG", raising=False)


@pytest.fixture(scope="module")
def model(tiny, tokenizer, tmp_path_factory) -> str:
    """Overrides that choose a tiny target; `draft` beside it is like it."""
    folder = tmp_path_factory.mktemp("models")
    for name, noise in {"target": 0.0, "draft": 0.02}.items():
        tiny(vocab_size=len(tokenizer), noise=noise, max_position_embeddings=512).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return str(folder)


@pytest.fixture
def run(model: str, capfd: pytest.CaptureFixture[str]):
    """Runs an experiment on the tiny target; its status, stdout, stderr and rows."""

    def run(experiment: str, *words: str) -> tuple[int, str, str, list[dict]]:
        rows = Path("rows.jsonl")
        chosen = ("target=hf", f"target.path={model}/target", "sampling.max_new_tokens=12", "output=rows.jsonl")
        status = cli.main([experiment, *chosen, *words])
        out, err = capfd.readouterr()
        return status, out, err, [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []

    return run


def test_help_names_every_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in ("generate", "benchmark"):
        assert f"\n  {name} " in out
    assert cli.main(["generate", "--help"]) == 0
    assert "drafter/policy  chain, coupled, mixed, sampled, static, top_k" in capsys.readouterr().out
    assert cli.main(["generate", "--cfg", "job"]) == 0
    assert "specdec.drafters.NGramDrafter" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("genrate prompt=a", ["unknown experiment 'genrate'", "did you mean 'generate'", "benchmark, "]),
        ("generate --verbose", ["--verbose", "--multirun"]),
        ("generate hello", ["'hello'", "key=value"]),
        (
            "generate rule=fellow",
            [
                "rule=fellow",
                "'follow'",
                "block, coupled, follow, kseq, recursive, rejection, threshold, traversal, typical",
            ],
        ),
        ("generate drafter/policy=tree", ["drafter/policy=tree", "chain, coupled, mixed, sampled, static, top_k"]),
        ("generate sampling=3", ["sampling=3", "default, greedy, nucleus"]),
        ("generate rul=follow", ["'rul'", "rule"]),
        ("generate sampling.temprature=1", ["'sampling.temprature'", "sampling.temperature?"]),
        ("generate temperature=1", ["'temperature'", "sampling.temperature"]),
        ("generate zzz=1", ["'zzz'", "prompt_file"]),
        ("generate drafter=none drafter.policy.total=8", ["drafter.policy.total", "drafter=none"]),
        ("generate drafter=none drafter/policy=chain", ["drafter/policy"]),
        ("generate sampling.temperature=hot", ["sampling.temperature=hot", "Float"]),
        ("generate sampling.top_p=3 prompt=a", ["top_p=3.0", "(0, 1]"]),
        ("generate sampling.top_k=1,2 prompt=a", ["sampling.top_k=1,2", "-m"]),
        ("generate +extra=1 prompt=a", ["extra", "prompt_file"]),
        ("generate target=hf prompt=a", ["target.path"]),
        ("generate target.dtype=${nothing} prompt=a", ["target.dtype", "nothing"]),
        ("generate target=hf target.path=/not/here prompt=a", ["/not/here"]),
        ("generate target=hf target.path=a drafter=small_model prompt=a", ["draft="]),
        ("generate rule=rejection prompt=a", ["rule=rejection", "drafter/policy=top_k", "chain"]),
        ("generate drafter.policy.total=1 prompt=a", ["total=1"]),
        ("generate", ["prompt=", "prompt_file="]),
        ("generate prompt=a prompt_file=b.txt", ["prompt=", "prompt_file="]),
        ("generate prompt_file=missing.jsonl", ["missing.jsonl"]),
        ("generate prompt=a chat=perhaps", ["chat=perhaps", "auto"]),
        ("generate prompt=a template=wordless", ["template='wordless'", "{prompt}"]),
        ("generate prompt=a output=no/such/folder.jsonl", ["no/such/folder.jsonl"]),
        ("generate prompt=a tracking=wandb tracking.mode=loud", ["tracking.mode=loud", "offline"]),
        ("generate -m prompt=a drafter=ngram,ngrm", ["drafter=ngrm", "small_model"]),
        ("benchmark", ["prompt_file"]),
        ("benchmark prompt_file=p.txt engine.max_batch_size=2", ["engine.max_batch_size=2"]),
        ("benchmark prompt_file=p.txt sampling=default", ["greedy"]),
        ("benchmark prompt_file=p.txt systems=['drafter=ngrm']", ["drafter=ngrm", "small_model"]),
        ("benchmark prompt_file=p.txt systems=['drafter.policy.totl=3']", ["drafter.policy.total"]),
    ],
)
def test_error_is_one_line_that_names_the_value(words: str, parts: list[str], capfd, monkeypatch) -> None:
    Path("p.txt").write_text("a\n")
    for experiment in (generate, benchmark):
        if "/not/here" not in words:
            monkeypatch.setattr(experiment, "load_target", lambda config: pytest.fail("the model was loaded"))
    assert cli.main(words.split(" ")) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("specdec: error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert all(part in err for part in parts), err


@pytest.mark.parametrize(
    ("name", "content", "words", "parts"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"promt": "b"}\n', [], ["line 2", "promt"]),
        ("p.jsonl", '{"prompt": "a"}\nnot json\n', [], ["line 2", "JSON"]),
        ("p.jsonl", '{"prompt": 3}\n', [], ["line 1", "3"]),
        ("p.jsonl", "[1]\n", [], ["line 1"]),
        ("p.jsonl", '{"prompt": "a"}\n', ["prompt_field=text"], ["text"]),
        ("p.txt", "\n", [], ["no prompts"]),
        ("p.txt", "a\n", ["limit=0"], ["limit=0"]),
        ("p.csv", "a\n", [], [".jsonl"]),
    ],
)
def test_prompt_file_errors_name_the_line(name, content, words, parts, capfd) -> None:
    Path(name).write_text(content)
    assert cli.main(["generate", f"prompt_file={name}", *words]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and all(part in err for part in parts), err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_DEBUG", "1")
    with pytest.raises(ValueError, match="prompt_file"):
        cli.main(["generate"])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(alphabet=st.one_of(st.sampled_from("\\'\"${}[](),=: \n"), st.characters(exclude_categories=("Cs",)))))
def test_quoted_text_means_itself(text: str) -> None:
    override = cli.OverridesParser.create().parse_override(f"prompt={cli.quote(text)}")
    assert not override.is_sweep_override()
    assert OmegaConf.create({"prompt": override.value()}).prompt == text
    # A sweep writes the override out and reads it again.
    again = cli.OverridesParser.create().parse_override(f"prompt={override.get_value_element_as_str()}")
    assert OmegaConf.create({"prompt": again.value()}).prompt == text


def test_only_text_is_quoted() -> None:
    words = ["prompt='a, b'", "output=null", "limit=3", "drafter=ngram", "sampling.stop=[a,b]", "-m"]
    assert cli.quote_words(words) == words
    assert cli.quote_words(["-m", "prompt=a,b"]) == ["-m", "prompt=a,b"]
    assert cli.quote_words(["prompt='a' and 'b'", "output=a b"]) == ["prompt='\\'a\\' and \\'b\\''", "output='a b'"]


def test_text_that_is_not_utf8_is_refused(capfd) -> None:
    assert cli.main(["generate", "prompt=\udcff"]) == 2
    assert "UTF-8" in capfd.readouterr().err


def test_prompts_arrive_as_typed(run) -> None:
    texts = [text for text in NASTY if text]
    for text in texts:
        assert run("generate", f"prompt={text}", "sampling.max_new_tokens=1")[0] == 0
    rows = run("generate", "-m", f"prompt={NASTY[0]}", "sampling.max_new_tokens=1")[3]
    assert [row["prompt"] for row in rows] == [*texts, NASTY[0]]


def test_single_prompt_streams_its_text_and_ends_with_a_table(run) -> None:
    status, out, err, rows = run(
        "generate", "prompt=abcabcabc", "compare=true", "drafter=ngram", "engine.speculation=fixed"
    )
    assert status == 0 and err == ""
    (row,) = rows
    assert set(row) >= ROW_FIELDS
    assert out.startswith(row["text"] + "\n")
    assert set(row["plain"]) == {"token_ids", "tokens_per_s", "ttft_s"}
    assert row["plain"]["token_ids"] == row["token_ids"] and len(row["token_ids"]) <= 12
    assert 0 < row["itl_p50_s"] <= row["itl_p95_s"] <= row["itl_p99_s"]
    pairs = zip(row["accepted_by_depth"], row["drafted_by_depth"], strict=True)
    assert row["acceptance_by_depth"] == [accepted / drafted for accepted, drafted in pairs] != []
    assert row["target"] == "target" and row["policy"] == "top_k(total=16, depth=5, k=4)" and row["seed"] == 0
    for name in (
        "tau",
        "accepted per depth",
        "tokens/s",
        "first token",
        "target forwards",
        "draft",
        "verify",
        "speedup",
    ):
        assert name in out
    assert "yes, token for token" in out and "LOSSY" not in out


def test_file_of_prompts_gives_a_row_each(run) -> None:
    lines = [{"question": f"what is {i}"} for i in range(5)]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ("prompt_file=p.jsonl", "limit=3", "compare=true", "engine.max_batch_size=2", "sampling=default", "draft=x")
    status, out, _, rows = run("generate", *words)
    assert status == 0 and "3 rows in rows.jsonl" in out
    assert [(row["index"], row["prompt"]) for row in rows] == [(i, f"what is {i}") for i in range(3)]
    assert all(row["plain"]["token_ids"] == row["token_ids"] for row in rows)


def test_seeds_that_are_drawn_are_those_of_both_sides(run) -> None:
    Path("p.txt").write_text("one\ntwo\n")
    _, out, _, rows = run("generate", "prompt_file=p.txt", "compare=true", "sampling=default", "sampling.seed=null")
    assert rows[0]["seed"] != rows[1]["seed"] and "yes, token for token" in out


def test_chat_template_is_applied_unless_told_otherwise(run) -> None:
    run("generate", "prompt=ab")
    rows = run("generate", "prompt=ab", "chat=false")[3]
    with_chat, without = (row["prompt_token_ids"] for row in rows)
    assert with_chat == [1, *without, 2]


def test_multirun_writes_the_rows_of_every_job(run, model: str) -> None:
    words = ("prompt=abab", f"draft={model}/draft", "drafter=ngram,small_model", "drafter.policy.total=4,8")
    status, _, _, rows = run("generate", "-m", *words)
    assert status == 0
    chosen = {(row["drafter"], row["num_nodes"]) for row in rows}
    assert chosen == {(drafter, total) for drafter in ("ngram", "small_model(draft)") for total in (4, 8)}
    assert len({tuple(row["token_ids"]) for row in rows}) == 1


def test_rows_go_to_the_run_folder_by_default(model: str, capfd) -> None:
    words = ["target=hf", f"target.path={model}/target", "prompt=ab", "sampling.max_new_tokens=2"]
    assert cli.main(["generate", *words]) == 0
    (rows,) = Path("outputs/generate").glob("*/generate.jsonl")
    assert json.loads(rows.read_text())["prompt"] == "ab"
    assert "prompt: ab" in (rows.parent / ".hydra" / "config.yaml").read_text()


def test_interrupted_run_keeps_its_rows(run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("p.txt").write_text("one\ntwo\nthree\n")
    write = JsonlTracker.row

    def stop_after_two(self: JsonlTracker, row: dict) -> None:
        write(self, row)
        if row["index"] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(JsonlTracker, "row", stop_after_two)
    status, _, err, rows = run("generate", "prompt_file=p.txt", "engine.max_batch_size=1")
    assert status == 130 and [row["prompt"] for row in rows] == ["one", "two"]
    assert err.strip() == "specdec: interrupted: finished rows are in rows.jsonl"


def test_wandb_offline_writes_locally(run) -> None:
    status, _, _, rows = run("generate", "prompt=ab", "tracking=wandb", "hydra.run.dir=here")
    assert status == 0 and len(rows) == 1
    assert list(Path("here/wandb").glob("offline-run-*/run-*.wandb"))


def test_experiment_runs_as_a_script(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "experiments" / "generate.py"), run_name="__main__")
    assert stop.value.code == 0 and "drafter/policy" in capsys.readouterr().out


def test_benchmark_measures_every_system_and_resumes(run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("p.txt").write_text("abcabc\nxyz\n")
    systems = 'systems=["drafter=ngram","drafter=small_model drafter/policy=chain rule=rejection"]'
    words = ("prompt_file=p.txt", systems, f"draft={model}/draft", "work_dir=.", "prompts=letters", "template=code")
    words += ("memory=false",)
    write = JsonlTracker.row

    def stop_at_the_second_prompt(self: JsonlTracker, row: dict) -> None:
        write(self, row)
        if row.get("prompt") == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(JsonlTracker, "row", stop_at_the_second_prompt)
        status, _, err, rows = run("benchmark", *words)
    assert status == 130 and "work_dir=." in err and not rows
    with Path("raw.jsonl").open("a") as raw:
        raw.write('{"key": "cut o')

    status, out, _, rows = run("benchmark", *words)
    assert status == 0 and "6 rows in rows.jsonl" in out
    assert [(row["system"], row["drafter"]) for row in rows] == [
        ("specdec", "plain"),
        ("specdec", "ngram"),
        ("specdec", "small_model(draft)"),
        ("transformers", "plain"),
        ("transformers", "prompt_lookup"),
        ("transformers", "assisted(draft)"),
    ]
    for row in rows:
        assert set(row) >= RESULT_FIELDS
        assert row["prompts"] == "letters" and row["num_prompts"] == 2 and row["resumed_measurements"] == 7
        assert row["same_text_as_plain"] == row["same_text_as_transformers"] == 1
        assert row["efficiency"] == pytest.approx(row["speedup"] / row["tau"])
        assert row["command"].startswith("specdec benchmark target=hf ")
    assert [row["tau"] for row in rows if row["drafter"] == "plain"] == [1, 1]
    assert [row.get("speculation") for row in rows] == ["plain", "fixed", "fixed", None, None, None]
    assert rows[2]["tau"] > 1 and rows[2]["rule"] == "rejection" and rows[2]["policy"] == "chain(depth=5, kind=fixed)"


def test_benchmark_samples_where_transformers_is_left_out(run) -> None:
    Path("p.txt").write_text("abcabc\nxyz\n")
    status, _, err, rows = run(
        "benchmark", "prompt_file=p.txt", "transformers=false", "sampling.temperature=1.0", "memory=false"
    )
    assert status == 0, err
    assert [(row["drafter"], row["temperature"], row["same_text_as_plain"]) for row in rows] == [
        ("plain", 1.0, 1),
        ("ngram", 1.0, 1),
    ]
    assert rows[1]["transformers_plain_tokens_per_s"] is None and rows[1]["plain_tokens_per_s"] > 0


@pytest.mark.real_model
def test_real_model_generates_the_plain_text_in_float32(capfd) -> None:
    words = [
        "prompt=Repeat this: the cat sat on the mat, the dog sat on the log.",
        "compare=true",
        "sampling.max_new_tokens=24",
    ]
    assert cli.main(["generate", *words, "target.dtype=float32", "output=rows.jsonl"]) == 0
    row = json.loads(Path("rows.jsonl").read_text())
    assert row["token_ids"] == row["plain"]["token_ids"] and row["tau"] > 1
    assert "yes, token for token" in capfd.readouterr().out
