"""Training data: what a record is, what is left out, and that stopping and going on changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from specdec import cli
from specdec.drafters.training.collect import collect
from specdec.drafters.training.exclusion import Exclusion, text_hash
from specdec.drafters.training.records import Record, RecordSet, RecordWriter, is_held_out
from specdec.drafters.training.sources import Documents, user_turn

WORDS = "one two three four five six seven eight nine ten"


def record(*tokens: int, source: int = 0, prompt: int = 1) -> Record:
    return Record(torch.tensor(tokens), torch.arange(len(tokens)) >= prompt, source)


@pytest.fixture(scope="module")
def model(tiny, tokenizer, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "target"
    target = tiny(vocab_size=len(tokenizer), max_position_embeddings=512)
    # Otherwise a random model hardly ever ends a turn.
    target.lm_head.weight.data[2] *= 3
    target.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Runs `specdec data` with a tiny target into the folder `data`; status and what was printed."""
    monkeypatch.chdir(tmp_path)

    def make(*words: str) -> tuple[int, str]:
        chosen = ("target=hf", f"target.path={model}", "folder=data", "engine.max_batch_size=4", "max_length=40")
        status = cli.main(["data", *chosen, "sampling.max_new_tokens=6", "shard_size=4", *words])
        captured = capfd.readouterr()
        return status, captured.out + captured.err

    return make


def all_records(folder: str | Path | list[Path]) -> list[tuple[list[int], list[bool]]]:
    return [(one.token_ids_T.tolist(), one.loss_mask_T.tolist()) for one in RecordSet(folder, "all")]


def test_records_survive_the_disk_and_shards(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path, {"held_out": 0.0}, {"command": "test"}, shard_size=2)
    given = [record(1, 2, 3, source=11), record(4, 5, source=12), record(6, 7, 8, 9, source=13, prompt=3)]
    for one in given:
        writer.commit([one], {"offered": 1})
    writer.commit([record(4, 5, source=99)], {})
    writer.flush()
    found = list(RecordSet(tmp_path))
    for one, other in zip(found, given, strict=True):
        assert torch.equal(one.token_ids_T, other.token_ids_T)
        assert torch.equal(one.loss_mask_T, other.loss_mask_T)
        assert one.source_hash == other.source_hash
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["counts"] == {"records": 3, "offered": 3, "duplicate_records": 1}
    assert [(one["num_records"], one["num_tokens"], one["num_loss_tokens"]) for one in manifest["shards"]] == [
        (2, 5, 3),
        (1, 4, 1),
    ]


def test_folders_read_together(tmp_path: Path) -> None:
    """One behind the other, each split by its own share."""
    for name, share in {"a": 0.0, "b": 1.0}.items():
        writer = RecordWriter(tmp_path / name, {"held_out": share}, {}, shard_size=2)
        writer.commit([record(i, 7, source=i) for i in range(3)], {})
        writer.flush()
    folders = [tmp_path / "a", tmp_path / "b"]
    assert all_records(folders) == all_records(folders[0]) + all_records(folders[1])
    held = RecordSet(folders, "held_out")
    assert len(RecordSet(folders)) == len(held) == 3
    assert [held.index_in_folder(i) for i in range(3)] == [3, 4, 5]
    prints = {RecordSet(one, "all").fingerprint for one in (folders, folders[::-1], folders[0])}
    assert len(prints) == 2, "the same records in both folders, so their order is nothing"


def test_a_changed_shard_and_other_settings_are_refused(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path, {"seed": 0}, {})
    writer.commit([record(1, 2)], {})
    writer.flush()
    with pytest.raises(ValueError, match=r"made with seed=0, not 1"):
        RecordWriter(tmp_path, {"seed": 1}, {})
    shard = tmp_path / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x07")
    with pytest.raises(ValueError, match="missing or changed"):
        RecordSet(tmp_path)


def test_the_split_follows_the_source(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path, {"held_out": 0.3}, {})
    sources = [text_hash(f"prompt {i}") for i in range(200)]
    # Two records of one source never part.
    writer.commit([record(i, j, source=one) for i, one in enumerate(sources) for j in (1, 2)], {})
    writer.flush()
    train, held = RecordSet(tmp_path, "train"), RecordSet(tmp_path, "held_out")
    assert len(train) + len(held) == 400
    assert 80 < len(held) < 160
    assert not {one.source_hash for one in train} & {one.source_hash for one in held}
    assert all(is_held_out(one.source_hash, 0.3) for one in held)


def test_exclusion_sees_through_spelling_and_finds_shared_words() -> None:
    exclusion = Exclusion([WORDS, "Hello there"], ngram=5)
    assert "ONE  two, three four five - six seven eight nine ten!" in exclusion
    assert "he said: four five six seven eight, then left" in exclusion
    assert "four five six seven and eight" not in exclusion
    assert "hello THERE." in exclusion
    assert "hello there, how are you" not in exclusion
    assert "" not in Exclusion([])


def test_windows_cover_a_document(tokenizer) -> None:
    text = WORDS * 3
    records = Documents([text], tokenizer, max_length=32, min_length=2).records([text])
    assert torch.equal(torch.cat([one.token_ids_T for one in records]), torch.tensor(tokenizer(text)["input_ids"]))
    assert all(one.loss_mask_T.all() and one.source_hash == text_hash(text) for one in records)


def test_user_turn_is_read_off_the_template(tokenizer) -> None:
    assert user_turn(tokenizer) == ("<s>", (2,), ())
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
        assert user_turn(tokenizer) == ("[INST] ", (), ("[/INST]",))
        tokenizer.chat_template = "{{ messages[0]['content'] | upper | replace('P', 'Q') }}"
        with pytest.raises(ValueError, match="source=prompts"):
            user_turn(tokenizer)
    finally:
        tokenizer.chat_template = before


def test_self_generated_data_and_an_interruption(make, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("num_records=10", "source.max_prompt_tokens=12")
    assert make(*words, "folder=whole")[0] == 0
    whole = all_records("whole")
    assert len(whole) >= 10
    for tokens, mask in whole:
        prompt = mask.index(True)
        assert tokens[0] == 1 and 1 < prompt <= len(tokens) - 1 and all(mask[prompt:]) and not any(mask[:prompt])
        assert len(tokens) <= 40

    for _ in range(2):
        with monkeypatch.context() as patched:
            patched.setattr("specdec.experiments.data.collect", interrupted_after_a_batch)
            status, said = make(*words)
        assert status == 130 and "goes on from there" in said
    assert 0 < len(all_records("data")) < len(whole)
    assert make(*words)[0] == 0
    assert all_records("data") == whole


def interrupted_after_a_batch(source, writer, exclusion, num_records, on_batch) -> None:
    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    collect(source, writer, exclusion, num_records, interrupt)


def test_given_prompts_without_evaluation_prompts_and_duplicates(make, tmp_path: Path) -> None:
    prompts = ["first prompt", "FIRST, prompt!", "evaluate me", "second"]
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    (tmp_path / "eval.jsonl").write_text('{"question": "Evaluate me."}\n')
    status, said = make("source=prompts", "source.prompt_file=p.txt", "exclude=[eval.jsonl]", "num_records=null")
    assert status == 0, said
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert manifest["counts"] == {"records": 2, "offered": 4, "duplicate_sources": 1, "excluded": 1}
    assert manifest["settings"]["target"] == "target"
    assert manifest["runs"][0]["command"].startswith("specdec data ")
    # Nothing is left to do, so nothing is done; other settings need another folder.
    assert make("source=prompts", "source.prompt_file=p.txt", "exclude=[eval.jsonl]", "num_records=null")[0] == 0
    assert len(all_records("data")) == 2
    status, said = make("source=prompts", "source.prompt_file=p.txt", "num_records=null")
    assert status == 2 and "made with excluded=" in said


def test_prompts_from_a_dataset(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    rows = [{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": f"q{i}"}]} for i in range(3)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    words = ("source=dataset", "source.path=json", "source.data_files=rows.json", "num_records=null")
    status, said = make(*words, "source.field=messages")
    assert status == 0, said
    assert len(all_records("data")) == 3
    status, said = make(*words, "folder=other")
    assert status == 2 and "columns messages" in said


def test_plain_text(make, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(map(str, range(60))))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": WORDS}) + "\n")
    status, said = make("source=text", "source.files=?.*", "source.min_length=4", "num_records=null")
    assert status == 0, said
    assert sum(len(tokens) for tokens, _ in all_records("data")) == 169 + len(WORDS)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["num_records=null"], "never ends"),
        (["num_records=0"], "num_records=0"),
        (["held_out=1"], "held_out=1"),
        (["max_length=4"], "max_length=4"),
        (["max_length=4000"], "max_length=4000 is more than target takes: 512"),
        (["sampling.stop=[x]"], "sampling.stop"),
        (["exclude=[nowhere.jsonl]"], "nowhere.jsonl: no such file"),
        (["source=text", "source.files=nothing*"], "matches no file"),
        (["source=prompts"], "source.prompt_file is missing"),
    ],
)
def test_errors_are_one_line(make, words: list[str], part: str) -> None:
    status, said = make(*words)
    assert status == 2
    assert part in said and said.count("\n") == 1
