"""`specdec inspect` and `specdec export`: the table, the exit status, the path that needs no key."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import published
import pytest
from published import HIDDEN, VOCAB

from specdec import cli
from specdec.checkpoint import read_checkpoint

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]):
    """Runs a command; its status, stdout and stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        status = cli.main([*words])
        return status, *capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def target(tiny, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a target that fits; of another vocabulary beside it."""
    folder = tmp_path_factory.mktemp("models")
    for name, size in {"fits": VOCAB, "other": VOCAB + 3}.items():
        tiny(vocab_size=size, hidden_size=HIDDEN, num_hidden_layers=8).config.save_pretrained(folder / name)
    return str(folder)


@pytest.mark.parametrize(
    ("make", "file", "parts"),
    [
        (
            published.medusa,
            "medusa_lm_head.pt",
            ["Medusa heads, format medusa", "made for org/target", "blocks in each: 2"],
        ),
        (published.eagle1, "pytorch_model.bin", ["EAGLE head (EAGLE-1 and EAGLE-2), format eagle", "vocabulary 97"]),
        (
            published.eagle3,
            "model.safetensors",
            ["EAGLE-3 head, format eagle3", "23 of 97 tokens", "2, L // 2 and L - 3"],
        ),
        (
            published.speculators,
            "model.safetensors",
            ["format speculators", "hidden states 1, 4, 6", "residual is normed"],
        ),
    ],
)
def test_inspect_says_what_a_checkpoint_is(make, file: str, parts: list[str], run, target: str) -> None:
    published.write(Path("head"), *make(), file)
    status, out, err = run("inspect", "head")
    assert (status, err) == (0, "")
    assert all(part in out for part in ["hidden size 32", file, "float32", "sound: head", *parts]), out
    status, out, _ = run("inspect", "head", f"model={target}/fits")
    assert status == 0 and f"sound: head, fits {target}/fits" in out and "L // 2" not in out
    status, out, _ = run("inspect", "head", f"model={target}/other")
    assert status == 1 and "made for a vocabulary of 97; this target has 100" in out


def test_inspect_names_what_is_wrong(run) -> None:
    tensors, config = published.eagle3()
    del tensors["norm.weight"]
    published.write(Path("head"), tensors, config | {"hidden_size": 64}, "model.safetensors")
    status, out, _ = run("inspect", "head")
    assert status == 1 and "NOT SOUND (2 problems): head" in out
    assert "missing tensors: norm.weight" in out and "32 by fc.weight, but 64 by hidden_size in config.json" in out
    Path("head/model.safetensors").write_bytes(b"short")
    status, out, _ = run("inspect", "head")
    assert status == 1 and "No head that can be read" in out and "cut off or corrupt" in out


def test_a_path_is_taken_as_it_is_typed(run) -> None:
    for name in ("it's a (head), really", "step=3", "a,b", "${x}"):
        published.write(Path(name), *published.medusa(), "medusa_lm_head.pt")
        word = f"./{name}" if "=" in name else name
        status, out, err = run("inspect", word)
        assert status == 0 and f"sound: {word}" in out, err
        assert run("inspect", f"path={word}")[0] == 0


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("inspect", ["path is missing", "path=VALUE"]),
        ("inspect one two", ["'two'", "path='one' is given already"]),
        ("inspect path=one two", ["'two'", "path=one is given already"]),
        ("inspect nothing", ["nothing: no such folder here, and the hub does not give it"]),
        ("inspect ./nothing", ["'./nothing': no such file or folder"]),
        ("inspect head layer_ids=behind", ["layer_ids='behind'", "input or output"]),
        ("inspect head model=./nowhere", ["./nowhere"]),
        ("inspect head target=hf", ["target"]),
        ("export head", ["is missing"]),
        ("export head format=gguf output=new", ["format=gguf", "medusa, eagle, eagle3, vllm, speculators, specdec"]),
        ("export head format=vllm output=head", ["output=head is not empty"]),
        ("export head format=medusa output=new", ["format=medusa holds no eagle3 head", "speculators"]),
        ("export head format=vllm output=new", ["only the target tells its feature_layers", "model="]),
        ("generate hello", ["'hello'", "key=value"]),
    ],
)
def test_error_is_one_line(words: str, parts: list[str], run, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(path: str, **options: object) -> str:
        raise OSError("no connection")

    monkeypatch.setattr("specdec.checkpoint.snapshot_download", offline)
    published.write(Path("head"), *published.eagle3(), "model.safetensors")
    status, out, err = run(*words.split(" "))
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert all(part in err for part in parts), err
    assert not Path("new").exists()


@pytest.mark.parametrize("format", ["vllm", "speculators", "specdec", "eagle3"])
def test_export_writes_what_inspect_finds_sound(format: str, run, target: str) -> None:
    published.write(Path("head"), *published.eagle3(), "pytorch_model.bin")
    status, out, err = run("export", "head", f"format={format}", "output=new/one", f"model={target}/fits")
    assert (status, err) == (0, "")
    assert f"EAGLE-3 head, format {format}" in out and f"{format}: new/one/model.safetensors" in out
    assert run("inspect", "new/one", f"model={target}/fits")[0] == 0
    tensors = {name.replace("layers.0.", "midlayer."): one for name, one in read_checkpoint("new/one").tensors.items()}
    assert tensors.keys() == published.eagle3()[0].keys()
    assert all(tensors[name].equal(wanted) for name, wanted in published.eagle3()[0].items())


def test_export_names_the_target_it_is_told(run, target: str) -> None:
    published.write(Path("head"), *published.eagle3(), "model.safetensors")
    words = ("format=speculators", "output=new", f"model={target}/fits", "base_model=org/name")
    assert run("export", "head", *words)[0] == 0
    config = json.loads(Path("new/config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == "org/name"
    assert config["norm_before_residual"] is False and config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]


def test_help_shows_the_path_and_no_groups_that_do_not_apply(run) -> None:
    status, out, _ = run("inspect", "--help")
    assert status == 0 and "specdec inspect PATH" in out and "group=option" not in out and "layer_ids: null" in out
    status, out, _ = run("--help")
    assert status == 0 and "\n  inspect " in out and "\n  export " in out and "inspect_" not in out


@pytest.mark.parametrize("name", ["inspect_", "export"])
def test_commands_run_as_scripts(name: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "experiments" / f"{name}.py"), run_name="__main__")
    assert stop.value.code == 0 and "PATH" in capsys.readouterr().out


def test_no_experiment_hides_a_module_of_the_standard_library() -> None:
    # Run as a script, a file's own folder comes first in the search for modules.
    assert not [path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem in sys.stdlib_module_names]
