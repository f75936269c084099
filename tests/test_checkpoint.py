"""Checkpoint files: what is read is what is stored, and a bad file is one clear error."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from specdec import checkpoint
from specdec.checkpoint import DamagedCheckpointError, read_checkpoint, write_checkpoint

TENSORS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "b": torch.tensor([1, -2, 3]),
    "c": torch.tensor([True, False]),
    "d": torch.tensor([0.1, float("inf"), -0.0]).bfloat16(),
    "e": torch.tensor(2.5).half(),
}


class _Harm:
    def __reduce__(self):
        return (Path.touch, (Path("harm_was_done"),))


def same(found, wanted) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == wanted[name].dtype
        and found[name].shape == wanted[name].shape
        and found[name]
        .reshape(-1)
        .contiguous()
        .view(torch.uint8)
        .equal(wanted[name].reshape(-1).contiguous().view(torch.uint8))
        for name in wanted
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "one", TENSORS, {"kind": "test", "size": 4})
    return tmp_path / "one"


def test_what_is_written_is_read(folder: Path) -> None:
    found = read_checkpoint(folder)
    assert same(found.tensors, TENSORS) and found.config == {"kind": "test", "size": 4}
    assert found.files == (folder / "model.safetensors",)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_one_file_is_read_with_the_config_beside_it_or_without(folder: Path) -> None:
    assert read_checkpoint(folder / "model.safetensors").config["kind"] == "test"
    (folder / "config.json").unlink()
    found = read_checkpoint(folder / "model.safetensors")
    assert same(found.tensors, TENSORS) and found.config == {}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "medusa_lm_head.pt", "anything.pth"])
@pytest.mark.parametrize("is_old", [False, True])
def test_pickles_of_tensors_are_read(name: str, is_old: bool, tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / name, _use_new_zipfile_serialization=not is_old)
    assert same(read_checkpoint(tmp_path).tensors, TENSORS)


def test_shards_are_put_together(tmp_path: Path) -> None:
    names = sorted(TENSORS)
    shards = {name: f"model-{i % 2 + 1}-of-2.safetensors" for i, name in enumerate(names)}
    for file in set(shards.values()):
        save_file({name: TENSORS[name] for name in names if shards[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert same(read_checkpoint(tmp_path).tensors, TENSORS)
    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"model-2-of-2\.safetensors are missing"):
        read_checkpoint(tmp_path)


def test_safetensors_win_over_pickles(folder: Path) -> None:
    torch.save({"other": torch.zeros(1)}, folder / "pytorch_model.bin")
    assert same(read_checkpoint(folder).tensors, TENSORS)


def test_tied_and_strided_tensors_are_written(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    write_checkpoint(tmp_path, {"a": whole, "b": whole, "c": whole.T, "d": whole[:, 1], "e": whole[1]}, {})
    found = read_checkpoint(tmp_path).tensors
    assert found["b"].equal(whole) and found["c"].equal(whole.T) and found["d"].equal(whole[:, 1])
    assert found["e"].equal(whole[1])


def test_a_failed_write_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors, file, metadata):
        Path(file).write_text("half")
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        write_checkpoint(folder, {"a": torch.zeros(1)}, {})
    assert same(read_checkpoint(folder).tensors, TENSORS)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kept", [0, 7, 60, -9])
def test_a_cut_file_is_named(name: str, kept: int, tmp_path: Path) -> None:
    file = tmp_path / name
    save_file(TENSORS, file) if name.endswith("tensors") else torch.save(TENSORS, file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(DamagedCheckpointError, match="cut off or corrupt") as error:
        read_checkpoint(tmp_path)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "medusa_lm_head.pt"])
def test_a_page_instead_of_weights_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("<html>version https://git-lfs.github.com/spec/v1</html>")
    with pytest.raises(DamagedCheckpointError, match="cut off or corrupt"):
        read_checkpoint(tmp_path)


def test_a_pickle_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.zeros(1), "b": _Harm()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(DamagedCheckpointError, match="no pickle of tensors alone"):
        read_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(_Harm()))
    with pytest.raises(DamagedCheckpointError):
        read_checkpoint(tmp_path)
    assert not Path("harm_was_done").exists()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ([torch.zeros(1)], "a list"),
        ({"state_dict": {"a": torch.zeros(1)}}, "state_dict beside tensors"),
        ({}, "no tensors"),
    ],
)
def test_a_pickle_of_something_else_says_what_it_holds(content, part: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(DamagedCheckpointError, match=part):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "part"), [("{", "is not JSON"), ("[1]", "a list, not an object"), ("\xff", "is not JSON")]
)
def test_a_broken_config_is_named(text: str, part: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DamagedCheckpointError, match=rf"config\.json.*{part}"):
        read_checkpoint(folder)


def test_missing_places_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path / "none.safetensors", "../none", "", "weights.bin"):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            read_checkpoint(path)
    with pytest.raises(ValueError, match="no weight file; known names are"):
        read_checkpoint(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="is no weight file"):
        read_checkpoint(tmp_path / "notes.txt")
    for name in ("one.safetensors", "two.safetensors"):
        save_file(TENSORS, tmp_path / name)
    with pytest.raises(ValueError, match=r"several weight files \(one\.safetensors, two\.safetensors\)"):
        read_checkpoint(tmp_path)


def test_a_hub_id_is_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    assert same(read_checkpoint("owner/head").tensors, TENSORS)
    name, patterns = asked[0]
    assert name == "owner/head" and {"config.json", "*.safetensors", "*.bin", "*.pt"} <= set(patterns)

    def fail(name: str, allow_patterns: list[str]) -> str:
        raise RuntimeError("offline\nfor now")

    monkeypatch.setattr(checkpoint, "snapshot_download", fail)
    with pytest.raises(ValueError, match=r"owner/head: no such folder here, and the hub does not give it.*offline\)$"):
        read_checkpoint("owner/head")
