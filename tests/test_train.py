"""`specdec train` from data to a head that loads and serves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from specdec import cli
from specdec.config import EngineConfig, compose, to_typed
from specdec.drafters.choices import best_choices
from specdec.drafters.heads import MedusaConfig, MedusaHeads
from specdec.drafters.heads.formats import load_head, save_head
from specdec.drafters.heads.frequencies import FILE, FrequentTokens, read_frequencies
from specdec.drafters.training.cache import FeatureCache
from specdec.drafters.training.records import Record, RecordSet, RecordWriter
from specdec.drafters.training.rows import Row
from specdec.drafters.training.target import TrainingTarget
from specdec.drafters.training.vocabulary import coverage, most_frequent, token_counts
from specdec.experiments.building import build
from specdec.experiments.tau import held_out_prompts, measure_tau
from specdec.loading import model_sizes
from specdec.model import PagedModel
from specdec.sampling import SamplingParams


@pytest.fixture(autouse=True)
def fresh_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    yield
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()


@pytest.fixture(scope="module")
def model(tiny, tokenizer, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "target"
    tiny(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(model: str, tmp_path_factory) -> str:
    """Texts of the target's own, so that there is something to learn."""
    folder = tmp_path_factory.mktemp("data") / "own"
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("\n".join(f"prompt {i}" for i in range(40)))
    words = [f"target.path={model}", f"source.prompt_file={prompts}", f"folder={folder}", "sampling.max_new_tokens=24"]
    fixed = ["target=hf", "source=prompts", "sampling=greedy", "num_records=null", "held_out=0.2", "max_length=64"]
    assert cli.main(["data", *fixed, *words]) == 0
    return str(folder)


@pytest.fixture
def train(model: str, data: str, capfd: pytest.CaptureFixture[str]):
    """Runs `specdec train` on the tiny target into the folder `run`; status, what was printed, rows."""

    def train(*words: str) -> tuple[int, str, list[dict]]:
        fixed = ("target=hf", f"target.path={model}", f"data={data}", "folder=run", "eval_prompts=2")
        sizes = ("training.num_steps=4", "training.row_tokens=100", "training.eval_every=2", "training.log_every=2")
        status = cli.main(["train", *fixed, *sizes, "training.mixed_precision=no", "sampling.max_new_tokens=8", *words])
        captured = capfd.readouterr()
        rows = Path("run/rows.jsonl")
        found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
        return status, captured.out + captured.err, found

    return train


EXTRA = {
    "medusa": ["head.num_heads=3"],
    "medusa2": ["head.num_heads=2", "head.own_lm_head=false"],
    "eagle1": [],
    "eagle3": ["head.num_steps=2", "head.draft_vocab_size=60", "head.feature_layers=[0,1,2]"],
}


@pytest.mark.parametrize("kind", EXTRA)
def test_a_head_is_trained_saved_and_served(kind: str, train, model: str, data: str) -> None:
    status, said, rows = train(f"head={kind}", *EXTRA[kind])
    assert status == 0, said
    assert [(row["kind"], row.get("step")) for row in rows] == [
        ("train", 2),
        ("eval", 2),
        ("train", 4),
        ("eval", 4),
        ("summary", None),
    ]
    evals = [row for row in rows if row["kind"] == "eval"]
    assert all(row["tau"] >= 1 and 0 <= row["accuracy_1"] <= 1 and row["loss"] > 0 for row in evals)
    assert rows[-1]["tau"] == max(row["tau"] for row in evals) and rows[-1]["command"].startswith("specdec train ")
    assert Path("run/rows.png").stat().st_size > 0 and "evaluations" in said
    vocab_size = model_sizes(model).vocab_size
    counts_V = token_counts(RecordSet(data, "train"), vocab_size)
    wanted = most_frequent(counts_V, 20)
    assert torch.equal(FrequentTokens(f"run/best/{FILE}", 20).ids(vocab_size), wanted)
    # The saved head, served by hand, has the tau that chose it.
    target = PagedModel.load("run/best/target" if kind == "medusa2" else model)
    policy = build(to_typed(compose("train", ["data=a", "folder=b"])).policy)
    prompts = held_out_prompts(RecordSet(data, "held_out"), 2)
    found = measure_tau(
        load_head("run/best", target), target, policy, prompts, SamplingParams(max_new_tokens=8, seed=0), EngineConfig()
    )
    assert found["tau"] == rows[-1]["tau"]


@pytest.mark.parametrize("kind", ["medusa", "eagle1", "eagle3"])
def test_training_goes_on_from_a_head(kind: str, train) -> None:
    _, _, rows = train(f"head={kind}", *EXTRA[kind])
    still = ("training.learning_rate=1e-9", "eval_prompts=0")
    status, said, onward = train(
        f"head={kind}", *EXTRA[kind], "head.initial=run/best", "folder=onward", "output=run/rows.jsonl", *still
    )
    assert status == 0, said
    ended, begun = rows[-2], onward[-2]
    # The state that was evaluated last is where the second training stands still.
    if rows[-1]["best_step"] == 4:
        assert begun["loss"] == pytest.approx(ended["loss"], rel=1e-4)
    first = load_head("run/best").state_dict()
    for name, tensor in load_head("onward/best").state_dict().items():
        assert torch.allclose(tensor.float(), first[name].float(), atol=1e-5), name


@pytest.mark.parametrize("kind", ["eagle1", "eagle3"])
def test_a_wider_head_begins_as_the_narrower_one(kind: str, train) -> None:
    train(f"head={kind}", *EXTRA[kind])
    narrow = load_head("run/best")
    size = narrow.config.intermediate_size + 24
    words = (f"head={kind}", *EXTRA[kind], "head.initial=run/best", f"head.intermediate_size={size}")
    still = ("training.learning_rate=1e-9", "training.num_steps=1", "eval_prompts=0")
    status, said, _ = train(*words, "folder=onward", "output=run/rows.jsonl", *still)
    assert status == 0, said
    wide = load_head("onward/best")
    assert wide.config == replace(narrow.config, intermediate_size=size)
    torch.manual_seed(0)
    embeddings, features = torch.randn(2, 5, narrow.config.hidden_size)
    states = [head(embeddings, features, torch.arange(5), lambda q, k, v: q) for head in (narrow, wide)]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-4)
    # Units are added that read, so that they can learn.
    layer = wide.midlayer if kind == "eagle3" else wide.layers[0]
    assert float(layer.mlp.up_proj.weight[-24:].detach().std()) > 1e-3
    assert float(layer.mlp.down_proj.weight[:, -24:].detach().abs().max()) < 1e-6
    # A narrower one is another head.
    status, said, _ = train(
        f"head={kind}", *EXTRA[kind], "head.initial=onward/best", "folder=back", "output=run/rows.jsonl", *still
    )
    assert status == 2 and "head.initial=onward/best" in said and said.strip().count("\n") == 0


def test_held_out_prompts_come_from_all_folders(data: str) -> None:
    both = RecordSet([data, data], "held_out")
    half = len(both) // 2
    assert half >= 3
    first, second = held_out_prompts(both, 4)[:2], held_out_prompts(both, 4)[2:]
    assert first == second and first[0] != first[1]
    assert held_out_prompts(both, len(both)) == 2 * held_out_prompts(RecordSet(data, "held_out"), half)
    assert held_out_prompts(both, 0) == []
    with pytest.raises(ValueError, match=f"holds out {2 * half} records, and eval_prompts={2 * half + 1}"):
        held_out_prompts(both, 2 * half + 1)


@pytest.mark.parametrize("size", [40, 70])
def test_a_vocabulary_is_chosen_anew(size: int, train, model: str, data: str, tmp_path: Path) -> None:
    train("head=eagle3", *EXTRA["eagle3"])
    # Rows that nobody could take for the target's.
    begun = load_head("run/best")
    torch.nn.init.normal_(begun.lm_head.weight, generator=torch.Generator().manual_seed(3))
    save_head(begun, "run/best", base_model="target")
    still = ("training.learning_rate=1e-9", "eval_prompts=0", "output=run/rows.jsonl")
    status, said, _ = train(
        *("head=eagle3", *EXTRA["eagle3"], f"head.draft_vocab_size={size}", "head.keep_vocabulary=false"),
        *("head.initial=run/best", "folder=onward", *still),
    )
    assert status == 0, said
    before, after = load_head("run/best"), load_head("onward/best")
    target = PagedModel.load(model)
    # What the first training learnt from counts too.
    counts_V = 2 * token_counts(RecordSet(data, "train"), target.vocab_size)
    assert torch.equal(read_frequencies(f"onward/best/{FILE}", target.vocab_size), counts_V)
    known, ids = before.draft_to_target_R.tolist(), after.draft_to_target_R.tolist()
    assert ids == most_frequent(counts_V, size, before.draft_to_target_R).tolist() and len(ids) == size
    share = coverage(token_counts(RecordSet(data, "train"), target.vocab_size), torch.tensor(ids))
    assert f"{size} of {target.vocab_size} tokens, {share:.2%}" in said
    # Rows go with their tokens; of tokens that are new they begin as the target's.
    output = target.model.get_output_embeddings().weight
    assert set(known) & set(ids) and (size < 60 or set(ids) - set(known))
    for row, token in enumerate(ids):
        wanted = before.lm_head.weight[known.index(token)] if token in known else output[token]
        torch.testing.assert_close(after.lm_head.weight[row].float(), wanted.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(after.fc.weight.float(), before.fc.weight.float(), rtol=0, atol=1e-5)


def test_a_vocabulary_is_chosen_anew_only_behind_another_head(train) -> None:
    status, said, _ = train("head=eagle3", *EXTRA["eagle3"], "head.keep_vocabulary=false")
    assert status == 2 and "head.initial=PATH" in said and said.strip().count("\n") == 0


def test_a_head_of_another_shape_is_no_beginning(train) -> None:
    train("head=medusa", "head.num_heads=2")
    status, said, _ = train("head=medusa", "head.num_heads=3", "head.initial=run/best", "folder=onward")
    assert status == 2 and "head.initial=run/best" in said and said.strip().count("\n") == 0
    wider = ("head.intermediate_size=56", "head.keep_vocabulary=false")
    for words in ((*EXTRA["eagle3"], "head.keep_vocabulary=false"), (*EXTRA["eagle3"], *wider)):
        status, said, _ = train("head=eagle3", *words, "head.initial=run/best", "folder=onward")
        assert status == 2 and "head.initial=run/best" in said and said.strip().count("\n") == 0


def test_mixed_precision_and_wandb(train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    words = ("training.mixed_precision=bf16", "tracking=wandb", "tracking.mode=disabled")
    status, said, rows = train("head=eagle3", *EXTRA["eagle3"], *words)
    assert status == 0, said
    assert all(row["loss"] > 0 for row in rows if row["kind"] == "train")


def test_two_folders_are_one(train, data: str) -> None:
    words = ("head=medusa", "training.num_steps=2", "eval_prompts=0")
    status, _, rows = train(*words, f"data=[{data},{data}]")
    assert status == 0 and rows[-1]["kind"] == "summary"


def test_a_finished_training_does_nothing_more(train) -> None:
    assert train("head=medusa", *EXTRA["medusa"])[0] == 0
    status, said, rows = train("head=medusa", *EXTRA["medusa"])
    assert status == 0, said
    assert [row["kind"] for row in rows].count("eval") == 2
    status, said, _ = train("head=medusa", *EXTRA["medusa"], "training.seed=1")
    assert status == 2 and "seed=0, not 1" in said


@pytest.mark.parametrize("kind", ["medusa", "eagle1", "eagle3"])
def test_cached_features_give_the_same_losses(kind: str, train) -> None:
    status, said, online = train(f"head={kind}", *EXTRA[kind])
    assert status == 0, said
    status, said, cached = train(
        f"head={kind}", *EXTRA[kind], "folder=other", "cache=features", "output=run/rows.jsonl"
    )
    assert status == 0, said
    cached = cached[len(online) :]
    for one, other in zip(online[:-1], cached[:-1], strict=True):
        assert one == pytest.approx(other)


def test_a_cache_is_filled_where_it_was_left(tiny, tmp_path: Path) -> None:
    target = TrainingTarget(PagedModel(tiny()))
    generator = torch.Generator().manual_seed(0)
    writer = RecordWriter("data", {}, {})
    records = [
        Record(torch.randint(97, (5 + i,), generator=generator), torch.ones(5 + i, dtype=torch.bool), i)
        for i in range(7)
    ]
    writer.commit(records, {})
    writer.flush()
    everything = RecordSet("data", "all")
    options = {"hidden_size": 32, "dtype": torch.float32, "target_name": "t", "shard_size": 3}

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Stop

    cache = FeatureCache("cache", everything, (0, 2), **options)
    assert cache.bytes_per_token == 2 * 32 * 4
    with pytest.raises(Stop):
        cache.fill(target, 20, stop)
    again = FeatureCache("cache", everything, (0, 2), **options)
    seen = []
    again.fill(target, 20, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    row = Row.of([records[5], records[1], records[6]])
    torch.testing.assert_close(again([5, 1, 6], row, (2, 0)), target([], row, (2, 0)))
    assert sum(file.stat().st_size for file in Path("cache").glob("*.safetensors")) < 1.2 * again.num_bytes + 3000
    with pytest.raises(ValueError, match=r"layers=\[0, 2\], not \[1\]"):
        FeatureCache("cache", everything, (1,), **options)


def test_accuracies_give_trees_that_serve(model: str, data: str, tiny, capfd: pytest.CaptureFixture[str]) -> None:
    target = PagedModel.load(model)
    heads = MedusaHeads.initial(MedusaConfig(target.hidden_size, target.vocab_size, 2, has_own_lm_head=False))
    save_head(heads, "head")
    fixed = ["target=hf", f"target.path={model}", "drafter=medusa", "draft=head"]
    words = ["accuracies", *fixed, f"data={data}", "folder=trees", "limit=5", "batch_size=2", "totals=[4,9]"]
    assert cli.main(words) == 0
    said = capfd.readouterr().out
    assert "best static trees" in said and "drafter.policy.choices=trees/static-N.json" in said
    first, held = Path("trees/static-9.json").read_text(), json.loads(Path("trees/static-9.json").read_text())
    assert held["num_records"] == 5 and len(held["choices"]) <= 8 and held["counts"][0] >= held["counts"][1] > 0
    assert held["choices"] == best_choices(held["accuracies"], 9) and held["target"] == "target"
    # What was counted is not counted again.
    rows = Path("trees/raw.jsonl").read_text()
    assert cli.main(words) == 0 and Path("trees/raw.jsonl").read_text() == rows and len(rows.splitlines()) == 3
    assert json.loads(first)["choices"] == json.loads(Path("trees/static-9.json").read_text())["choices"]
    capfd.readouterr()
    serve = ["generate", *fixed, "drafter/policy=static", "drafter.policy.choices=trees/static-4.json", "prompt=abc"]
    assert cli.main([*serve, "sampling.max_new_tokens=4", "output=rows.jsonl"]) == 0


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["drafter=ngram"], "drafter=ngram has no network"),
        ([], "give draft="),
        (["draft=head", "totals=[1]"], "totals=[1]"),
        (["draft=head", "stride=0"], "stride=0"),
        (["draft=head", "data=nowhere"], "nowhere has no manifest.json"),
    ],
)
def test_what_accuracies_cannot_do_is_one_line(words: list[str], part: str, data: str, capfd) -> None:
    given = [] if any(word.startswith("data=") for word in words) else [f"data={data}"]
    assert cli.main(["accuracies", "folder=trees", *given, *words]) == 2
    said = capfd.readouterr().err
    assert part in said and said.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["data=nowhere"], "data=nowhere: no such folder"),
        (["data=[nowhere]"], "data=nowhere: no such folder"),
        (["data=[]"], "data=[] must be a folder or a list of folders"),
        (["data={a: 1}"], "must be a folder or a list of folders"),
        (["drafter=ngram"], "train has no drafter to choose; it has engine, head,"),
        (["folder=???"], "folder is missing: give folder=VALUE"),
        (["training.mixed_precision=int3"], "mixed_precision=int3"),
        (["training.num_steps=0"], "num_steps=0"),
        (["head=medusa", "training.row_tokens=100000"], "makes 1 rows of 100000 tokens, and a step takes 2"),
        (["eval_prompts=1000"], "eval_prompts=1000"),
        (["head=eagle3", "head.feature_layers=[0,1,9]", "head.draft_vocab_size=null"], "has 2 layers; give"),
        (["head=medusa2", "cache=features"], "leave out cache="),
    ],
)
def test_errors_are_one_line(train, words: list[str], part: str) -> None:
    status, said, _ = train("training.rows_per_step=2", *words)
    assert status == 2
    assert part in said and said.strip().count("\n") == 0
