"""The load experiment: what each contender serves, what a row says, what is drawn, and how a killed sweep goes on."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from interruption import interrupted_after
from rich.console import Console

from specdec import PagedModel, SamplingParams, cli
from specdec.config import EngineConfig
from specdec.drafters import NGramDrafter, TopK
from specdec.experiments import load
from specdec.experiments.arrivals import ClosedLoop, OpenLoop
from specdec.experiments.driving import Server, WallClock, drive
from specdec.experiments.load_report import load_picture, load_tables
from specdec.experiments.servers import EngineServer
from specdec.experiments.system import System, plain_system
from specdec.experiments.transformers_servers import ContinuousServer, StaticServer
from specdec.experiments.workload import LoadRequest
from specdec.verifiers import Follow

FIELDS = set(
    """experiment system target drafter policy rule num_nodes prompts temperature dtype device tau tokens_per_s
    plain_tokens_per_s speedup efficiency lossless command revision versions date concurrency rate speculation ttft_p50_s
    ttft_p95_s itl_p50_s itl_p95_s itl_p99_s occupancy prefix_hit_rate num_prompt_tokens_computed num_preemptions draft_share
    acceptance_by_depth verify_share accept_share other_share num_compared num_differing""".split()  # noqa: SIM905
)
SHARES = [True, False]
PROMPTS = [[5, 6, 7] * 4, [9, 10], [11, 12, 13, 14, 15], [5, 6, 7] * 4, [20] * 9]


def make_requests(**values: Any) -> list[LoadRequest]:
    return [
        LoadRequest(i, "set", prompt, SamplingParams(**{"max_new_tokens": 4 + i, "seed": i, **values}))
        for i, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture(scope="module")
def texts(tiny) -> list[list[int]]:
    """What the target says to each prompt, alone, by plain decoding."""
    engine = plain_system().engine(PagedModel(tiny()), EngineConfig(max_batch_size=1))
    return [engine.generate([one.prompt], one.params)[0].token_ids for one in make_requests()]


def make_server(kind: str, tiny: Any) -> Server:
    engine, clock = EngineConfig(max_batch_size=2, page_size=4), WallClock()
    if kind == "static":
        return StaticServer(PagedModel(tiny()), 2, clock)
    if kind == "continuous":
        return ContinuousServer(PagedModel(tiny()), engine, 32, share_prefixes=True, ignore_eos=False)
    drafting = System(NGramDrafter(), TopK(total=8, depth=3, k=2), Follow(), {})
    system = plain_system() if kind == "plain" else drafting
    return EngineServer(system.engine(PagedModel(tiny()), engine), clock)


@pytest.mark.parametrize("kind", ["plain", "fixed", "static", "continuous"])
def test_every_server_says_what_plain_decoding_says(kind: str, tiny, texts) -> None:
    requests, server = make_requests(), make_server(kind, tiny)
    for arrivals in (ClosedLoop(requests, 3), OpenLoop(requests, [0.0, 0.0, 0.0, 0.01, 0.02])):
        served = {one.index: one for one in drive(server, arrivals, WallClock())}
        assert [served[i].token_ids for i in range(len(requests))] == texts
        for one in served.values():
            times = [time for time, _ in one.emissions]
            assert sum(count for _, count in one.emissions) == len(one.token_ids)
            assert one.arrival_s <= times[0] and times == sorted(times)
    cost = server.cost()
    assert cost["tau"] == 1 if kind != "fixed" else cost["tau"] >= 1
    if kind in ("plain", "fixed"):
        assert cost["num_prompt_tokens"] == 2 * sum(map(len, PROMPTS)) and 0 < cost["occupancy"] <= 1
        assert sum(cost[f"{name}_share"] for name in ("draft", "verify", "accept", "other")) == pytest.approx(1)
        # Every request has ended; a tree is three levels deep at most.
        shares = cost["acceptance_by_depth"]
        assert len(shares) <= 3 and all(0 <= share <= 1 for share in shares) and any(shares) == (kind == "fixed")
    server.close()


def test_a_static_batch_keeps_its_places_until_its_longest_row_ends(tiny) -> None:
    server = StaticServer(PagedModel(tiny()), 3, WallClock())
    requests = make_requests(ignore_eos=True)
    drive(server, ClosedLoop(requests, len(requests)), WallClock())
    # Three rows for six steps and two for eight, of three places.
    assert server.cost()["num_steps"] == 14 and server.cost()["occupancy"] == pytest.approx((3 * 6 + 2 * 8) / (14 * 3))


def make_row(contender: str, concurrency: int, speed: float, share: bool = True, **values: Any) -> dict[str, Any]:
    system = contender.partition("_")[0]
    of_theirs = system == "transformers"
    return {
        "name": contender if share or of_theirs else f"{contender}, nothing shared",
        "contender": contender,
        "system": system if of_theirs else "specdec",
        "speculation": "plain" if of_theirs else contender,
        "lossless": True,
        "concurrency": concurrency,
        "rate": None,
        "share_prefixes": share,
        "tokens_per_s": speed,
        "tau": 1.0,
        "ttft_p50_s": 0.1,
        "ttft_p95_s": 0.2,
        "itl_p50_s": 0.01,
        "itl_p95_s": None,
        "itl_p99_s": None,
        "num_prompt_tokens": 900,
        "num_prompt_tokens_computed": 300 if share else 895,
        "num_compared": 8,
        "num_differing": 0,
        "target": "tiny",
        "dtype": "float32",
        "drafter_asked": "ngram",
        "num_asked": 8,
        "prompts": "letters",
        "max_batch_size": 4,
        "num_repeats": 3,
        **values,
    }


ROWS = [
    make_row(name, users, speed, share, **({} if name == "plain" else {"speedup": speed / (10 * users)}))
    for share in (True, False)
    for users in (1, 2, 4)
    for name, speed in {"plain": 10.0 * users, "fixed": 10.0 * users * (2.0 - 0.4 * users)}.items()
]


def test_a_curve_that_dips_is_not_called_faster_throughout() -> None:
    speedups = {1: 1.1, 2: 0.9, 4: 1.2, 8: 0.8}
    rows = [make_row("adaptive", users, 10.0, speedup=speedup) for users, speedup in speedups.items()]
    out = io.StringIO()
    Console(file=out, width=200).print(load_tables(rows))
    assert "up to about 6.0 users at once, but slower at 2" in out.getvalue()


def test_tables_show_the_crossover_and_what_sharing_spares() -> None:
    out = io.StringIO()
    Console(file=out, width=200).print(load_tables([*ROWS, make_row("transformers", 1, 5.0, False)]))
    text = out.getvalue()
    # Speedups 1.6, 1.2 and 0.4: one at 2.5 users.
    assert "fixed: faster than plain decoding up to about 2.5 users at once" in text and "but slower" not in text
    assert "sharing prefixes" in text and text.count("895") == 6
    out = io.StringIO()
    Console(file=out, width=200).print(load_tables([row for row in ROWS if row["share_prefixes"]]))
    assert "sharing prefixes" not in out.getvalue()


def test_the_picture_is_drawn_for_every_kind_of_load(tmp_path: Path) -> None:
    by_rate = [{**row, "rate": row["concurrency"], "concurrency": None} for row in ROWS]
    for name, rows in {"users": ROWS, "both": ROWS + by_rate}.items():
        load_picture(rows, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def model(tiny, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides that choose a tiny target, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    tiny(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained("target")
    tokenizer.save_pretrained("target")
    Path("a.txt").write_text("abcabcabc\nxyzxyz\n")
    Path("b.txt").write_text("hello\n")
    return ["target=hf", "target.path=target", "output=rows.jsonl", "work_dir=work", "sampling.max_new_tokens=6"]


def test_a_sweep_is_measured_written_drawn_and_goes_on_where_it_was(model, capfd, monkeypatch) -> None:
    words = [
        "load",
        *model,
        "mixture=[{prompt_file: a.txt, weight: 3}, {prompt_file: b.txt, name: words}]",
        "concurrencies=[1,2]",
        "rates=[500]",
        "num_requests=3",
        "num_repeats=2",
        "contenders=[plain,fixed,transformers,transformers_continuous]",
        f"share_prefixes={SHARES}",
        "prefix_tokens=20",
        "prefix_share=1.0",
        "engine.max_batch_size=2",
    ]
    kept = 5
    with interrupted_after(kept, monkeypatch):
        assert cli.main(words) == 130
    assert "go on with work_dir=work" in capfd.readouterr().err and not Path("rows.jsonl").exists()

    assert cli.main(words) == 0
    out, err = capfd.readouterr()
    rows = [json.loads(text) for text in Path("rows.jsonl").read_text().splitlines()]
    # Static batches are served once, whatever is shared.
    assert len(rows) == 3 * (1 + 3 * max(len(SHARES), 1)) and f"{len(rows)} rows in rows.jsonl" in out
    assert Path("rows.png").exists() and ("sharing prefixes" in out) == (len(SHARES) == 2)
    assert err.count("tokens/s") == len(rows) * 2 - kept
    for row in rows:
        assert row["resumed_measurements"] == kept and row["num_requests"] == 3 and row["prompts"] == "a+words"
        assert (row["concurrency"] is None) != (row["rate"] is None)
        assert row["num_compared"] == 3 and row["num_differing"] == 0
        if row["system"] == "specdec":
            assert set(row) >= FIELDS
    fixed = [row for row in rows if row["contender"] == "fixed"]
    assert {row["policy"] for row in fixed} == {"top_k(total=16, depth=5, k=4)"}
    assert all(row["speedup"] == pytest.approx(row["tokens_per_s"] / row["plain_tokens_per_s"]) for row in fixed)
    for row in rows:
        if row["system"] == "specdec":
            assert row["prefix_hit_rate"] == 0 if not row["share_prefixes"] else row["prefix_hit_rate"] > 0


def test_by_turns_the_texts_are_the_same_and_only_what_is_missing_is_served(model, capfd) -> None:
    words = ["load", *model, "prompt_file=a.txt", "concurrencies=[1,2]", "num_requests=3", "take_turns=true"]
    words += ["engine.max_batch_size=2", "contenders=[plain,fixed,adaptive,transformers]"]
    assert cli.main([*words, "num_repeats=1"]) == 0
    assert cli.main([*words, "num_repeats=2"]) == 0
    rows = [json.loads(text) for text in Path("rows.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * 4 and all(row["take_turns"] and row["num_differing"] == 0 for row in rows)
    assert [row["resumed_measurements"] for row in rows] == [0] * 8 + [8] * 8
    assert [row["num_repeats"] for row in rows] == [1] * 8 + [2] * 8
    # Where one of those who took turns is missing, or another has joined, all of them are served again.
    raw = Path("work/raw.jsonl")
    kept = raw.read_text().splitlines()
    assert len(kept) == 16
    raw.write_text("\n".join(kept[:-1]) + "\n")
    assert cli.main([*words, "num_repeats=2"]) == 0
    assert len(raw.read_text().splitlines()) == 15 + 4
    assert cli.main([*words, "num_repeats=1", "contenders=[plain,fixed]"]) == 0
    assert len(raw.read_text().splitlines()) == 15 + 4 + 2 * 2


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("", ["prompt_file", "mixture"]),
        ("prompt_file=a.txt mixture=[{prompt_file:b.txt}]", ["prompt_file", "mixture", "not both"]),
        ("mixture=[{prompt_file:a.txt},{prompt_file:a.txt}]", ["a, a"]),
        ("mixture=[{prompt_file:a.txt,weight:0}]", ["weight=0", "a.txt"]),
        ("mixture=[{prompt_fil:a.txt}]", ["prompt_fil"]),
        ("prompt_file=a.txt contenders=[fixed]", ["plain"]),
        ("prompt_file=a.txt contenders=[plain,vllm]", ["vllm", "transformers_continuous"]),
        ("prompt_file=a.txt contenders=[plain,plain]", ["once"]),
        ("prompt_file=a.txt contenders=[plain,transformers] sampling=default", ["temperature=1.0", "sampling=greedy"]),
        ("prompt_file=a.txt drafter=none", ["drafter=plain"]),
        ("prompt_file=a.txt concurrencies=[]", ["concurrencies=[]", "rates=[]"]),
        ("prompt_file=a.txt rates=[0]", ["rates=[0.0]"]),
        ("prompt_file=a.txt take_turns=true rates=[5]", ["take_turns=true", "rates=[5.0]"]),
        (
            "prompt_file=a.txt take_turns=true sampling=greedy contenders=[plain,transformers_continuous]",
            ["take_turns=true", "transformers_continuous"],
        ),
        ("prompt_file=a.txt num_requests=0", ["num_requests=0"]),
        ("prompt_file=a.txt duration_s=0", ["duration_s=0"]),
        ("prompt_file=a.txt share_prefixes=[true,true]", ["share_prefixes"]),
        ("prompt_file=a.txt prompt_length.low=3", ["prompt_length", "high=None"]),
        ("prompt_file=a.txt prefix_tokens=3", ["prefix_share=0.0"]),
        ("prompt_file=a.txt rule=rejection", ["rule=rejection", "drafter/policy=top_k"]),
    ],
)
def test_an_error_is_one_line_that_names_the_value(words, parts, capfd, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a\n")
    monkeypatch.setattr(load, "load_target", lambda config: pytest.fail("the model was loaded"))
    assert cli.main(["load", *words.split()]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("specdec: error: ") and err.count("\n") == 1
    assert all(part in err for part in parts), err
