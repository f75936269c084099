"""The benchmark's parts: peers in processes of their own, turns, intervals, rows, picture."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf.errors import ConfigKeyError

from specdec import cli
from specdec.config import PeerConfig, PeerModeConfig, TargetConfig, compose, peer_configs, to_typed
from specdec.experiments.benchmark_report import benchmark_picture, benchmark_table
from specdec.experiments.benchmark_rows import benchmark_rows
from specdec.experiments.benchmark_session import Session, batches_of
from specdec.experiments.bootstrap import interval
from specdec.experiments.contenders import Decoded
from specdec.experiments.handover import export_gguf
from specdec.experiments.peer_contenders import SCRIPTS, PeerContender, PeerJob, peer_contenders, present
from specdec.experiments.resume import Measurements
from specdec.sampling import SamplingParams

# Counts upwards from the prompt's last token; with a speculative_config it says that it needed half the forwards.
COUNTING = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
from protocol import Decoded, Loaded, serve

def load(job):
    print("libraries print")
    if job["options"].get("unloadable"):
        raise RuntimeError("no such weights")
    step = 2 if "speculative_config" in job["options"] else 1

    def decode(prompts, max_new_tokens, stop_token_ids):
        print("at any time")
        outputs = []
        for prompt in prompts:
            output = []
            while len(output) < max_new_tokens and not (output and output[-1] in stop_token_ids):
                output.append((prompt + output)[-1] + 1)
            outputs.append(output)
        return Decoded(outputs, 0.5 / step, 0.1, sum(-(-len(output) // step) for output in outputs))

    return Loaded("1.2.3", decode)

serve(load)
"""
# Loads, then answers with whatever `options` hold, or dies.
ODD = """
import json, sys
options = json.loads(sys.stdin.readline())["options"]
print(json.dumps({"version": "1"}), flush=True)
sys.stdin.readline()
if "answer" not in options:
    sys.exit("out of luck")
print(options["answer"], flush=True)
"""
PARAMS = SamplingParams(max_new_tokens=4, ignore_eos=True)


@pytest.fixture
def start(tmp_path: Path):
    """Starts the workers of a peer with a script of its own; all are ended after the test."""
    with ExitStack() as stack:

        def start(script: str, modes: dict[str, dict[str, Any]], draft: Path | None = None) -> list[PeerContender]:
            file = tmp_path / "its_worker.py"
            file.write_text(script)
            ways = {name: PeerModeConfig(**one) for name, one in modes.items()}
            peers = {"peer": PeerConfig(python=sys.executable, worker=str(file), modes=ways)}
            name = None if draft is None else draft.name
            job = PeerJob({"folder": tmp_path}, draft, name, "float32", 1, 64, 2, [9])
            return peer_contenders(present(peers), job, tmp_path, stack)

        yield start


def test_a_worker_decodes_and_rests(start) -> None:
    speculative = {"drafter": "ngram", "depth": 3, "options": {"speculative_config": {}}}
    drafting = {"drafter": "draft_model", "depth": 3, "needs_draft": True}
    plain, ngram = start(COUNTING, {"plain": {"drafter": "plain"}, "ngram": speculative, "draft": drafting})
    decoded = plain.decode([[3], [20]], PARAMS)
    assert decoded.peak_memory_bytes is not None and decoded.peak_memory_bytes > 2**20
    assert replace(decoded, peak_memory_bytes=None) == Decoded([[4, 5, 6, 7], [21, 22, 23, 24]], 8, 0.5, 0.1)
    stopping = SamplingParams(max_new_tokens=9)
    assert (
        ngram.decode([[6]], stopping).outputs == [[7, 8, 9]] and ngram.decode([[6]], stopping).num_target_forwards == 2
    )
    assert (ngram.labels["policy"], ngram.labels["num_nodes"], plain.labels["policy"]) == ("chain(depth=3)", 4, "none")
    assert ngram.versions == {"peer": "1.2.3"}
    # It waits until the worker is seen to have stopped; nothing that spins could disturb the next measurement.
    process = ngram.worker._process
    assert os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT) is not None
    ngram.worker.close()
    assert process.returncode is not None


def test_a_draft_model_is_handed_over(start, tmp_path: Path) -> None:
    drafting = {"drafter": "draft_model", "depth": 3, "needs_draft": True}
    _, draft = start(COUNTING, {"plain": {"drafter": "plain"}, "draft": drafting}, tmp_path / "small")
    assert draft.labels["drafter"] == "draft_model(small)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"peer plain: its worker died \(exit status 1\): out of luck"),
        ({"answer": "{"}, "not JSON"),
        ({"answer": '{"outputs": [[1]]}'}, "does not fit"),
        ({"answer": json.dumps({"error": "ValueError: too long"})}, "peer plain: ValueError: too long"),
        ({"outputs": [[4, 5, 6, 7], [1, 2, 3, 4]]}, "2 outputs for 1 prompts"),
        ({"outputs": [[4, 5, 6]]}, "3 new tokens that do not end in a stop token"),
        ({"outputs": [[4, 5, 6, 7, 8]]}, "5 new tokens"),
    ],
)
def test_a_worker_that_fails_is_told_of(start, options: dict[str, Any], message: str) -> None:
    if "outputs" in options:
        rest = {"seconds": 1.0, "ttft_s": 1.0, "num_target_forwards": 4, "peak_memory_bytes": None}
        options = {"answer": json.dumps({**options, **rest})}
    (one,) = start(ODD, {"plain": {"drafter": "plain", "options": options}})
    with pytest.raises(ValueError, match=message):
        one.decode([[3]], PARAMS)


def test_a_worker_that_cannot_load_is_told_of(start) -> None:
    with pytest.raises(ValueError, match=r"peer plain: RuntimeError: no such weights; see .*worker\.log"):
        start(COUNTING, {"plain": {"drafter": "plain", "options": {"unloadable": True}}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"python": "/no/such/python"}, "peers.x.python=/no/such/python"),
        ({"worker": "nobody.py"}, "peers.x.worker=nobody.py"),
        ({"model_format": "onnx"}, "model_format=onnx"),
        ({"modes": {}}, "drafter=plain"),
    ],
)
def test_a_peer_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"python": sys.executable, "worker": "vllm_worker.py"}
    good["modes"] = {"plain": PeerModeConfig(drafter="plain")}
    assert present({"x": PeerConfig(**good), "absent": PeerConfig(worker="nobody.py")}).keys() == {"x"}
    with pytest.raises(ValueError, match=message):
        present({"x": PeerConfig(**{**good, **changes})})


def test_a_peer_can_be_added_and_a_mode_changed() -> None:
    eagle = "{drafter: eagle3, depth: 4, options: {speculative_config: {method: eagle3}}}"
    mine = "{python: x, worker: /y.py, modes: {plain: {drafter: plain}}}"
    words = ["peers.vllm.modes.ngram.depth=8", f"+peers.vllm.modes.eagle3={eagle}", f"+peers.mine={mine}"]
    peers = peer_configs(to_typed(compose("benchmark", ["output=rows.jsonl", "work_dir=.", *words])).peers)
    assert peers["mine"].modes["plain"] == PeerModeConfig("plain") and peers["mine"].python == "x"
    assert peers["vllm"].modes["ngram"].options["speculative_config"]["num_speculative_tokens"] == 8
    assert peers["vllm"].modes["eagle3"].depth == 4
    # Every peer that ships has its worker and a plain mode.
    ready = {name: replace(peer, python=sys.executable) for name, peer in peers.items() if name != "mine"}
    assert present(ready).keys() == {"vllm", "openvino", "llama_cpp"}
    with pytest.raises(ConfigKeyError, match="pyton"):
        peer_configs({"mine": {"pyton": "x"}})


@dataclass
class Scripted:
    """A contender that says what it is told, in the time that it is told."""

    name: str
    system: str
    drafter: str
    seconds: Callable[[int], float]
    num_target_forwards: int | None = 2
    max_batch_size: int | None = None
    calls: list[tuple[str, int]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def labels(self) -> dict[str, Any]:
        plain = {"policy": "none", "rule": "follow", "num_nodes": 1, "lossless": True}
        return {"system": self.system, "drafter": self.drafter, **plain}

    def decode(self, prompts: list[list[int]], params: SamplingParams) -> Decoded:
        self.calls.append((self.name, prompts[0][0]))
        forwards = None if self.num_target_forwards is None else self.num_target_forwards * len(prompts)
        return Decoded([[1, 2, 3, 4]] * len(prompts), forwards, self.seconds(prompts[0][0]), 0.1)


def _session(contenders: list[Scripted], path: Path, sizes: list[int], repeats: int = 1) -> Session:
    raw = Measurements(path / "raw.jsonl")
    return Session(contenders, [[10], [20], [30]], PARAMS, sizes, repeats, raw, {"versions": {"specdec": "0"}})


def test_turns_alternate_and_are_remembered(tmp_path: Path) -> None:
    calls: list[tuple[str, int]] = []
    pair = [Scripted(name, name, "plain", lambda _: 1.0, calls=calls) for name in "ab"]
    first = _session(pair, tmp_path, [1])
    found = first.measure()
    warm = [("a", 10), ("b", 10)]
    # Each is warmed up on the spot, before its first turn.
    assert calls == [warm[0], ("a", 10), warm[1], ("b", 10), ("b", 20), ("a", 20), ("a", 30), ("b", 30)]
    assert [len(one.batches) for one in found] == [3, 3]
    first.raw.finish()
    calls.clear()
    again = _session(pair, tmp_path, [1])
    assert [one.batches for one in again.measure()] == [one.batches for one in found] and not calls
    assert again.raw.num_resumed == 6


def test_batches_are_full_and_left_to_those_who_can(tmp_path: Path) -> None:
    assert batches_of([[1], [2], [3]], 2) == [[[1], [2]], [[3], [1]]]
    pair = [Scripted("a", "a", "plain", lambda _: 1.0), Scripted("b", "b", "plain", lambda _: 1.0, max_batch_size=1)]
    found = _session(pair, tmp_path, [1, 2], repeats=2).measure()
    assert [(one.contender.name, one.batch_size) for one in found] == [("a", 1), ("b", 1), ("a", 2)]
    assert [len(batch) for batch in found[-1].batches] == [2, 2]


def test_rows_compare_a_system_with_its_own_plain_decoding(tmp_path: Path) -> None:
    contenders = [
        Scripted("a plain", "a", "plain", lambda _: 2.0, num_target_forwards=4),
        Scripted("a fast", "a", "ngram", lambda prompt: 1.0 if prompt < 30 else 2.0),
        Scripted("b plain", "b", "plain", lambda _: 0.5, num_target_forwards=None),
    ]
    found = _session(contenders, tmp_path, [1]).measure()
    plain, fast, other = rows = benchmark_rows(found, {("a fast", 1): {"peak_memory_bytes": 7}}, LABELS)
    assert fast["speedup"] == pytest.approx(6 / 4) and fast["tau"] == 2 and fast["efficiency"] == pytest.approx(3 / 4)
    low, high = fast["speedup_interval"]
    assert 1 <= low < fast["speedup"] < high <= 2
    assert fast["median_tokens_per_s"] == 4 and fast["median_tokens_per_s_interval"] == [2, 4]
    assert plain["speedup_interval"] == [1, 1] and plain["peak_memory_bytes"] is None and fast["peak_memory_bytes"] == 7
    assert other["speedup"] == 1 and other["tau"] is None and other["efficiency"] is None
    assert fast["same_text_as_plain"] == fast["same_prefix_as_plain"] == 1
    benchmark_picture(rows, tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 0
    assert benchmark_table(rows).row_count == 3


def test_a_gguf_file_is_handed_over_as_it_is_run(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    weights = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_context_length(64)
    writer.add_token_list(["a", "b"])
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("matrix", gguf.quants.quantize(weights.numpy(), q8_0), raw_dtype=q8_0)
    writer.add_tensor("vector", weights[0].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    reader = gguf.GGUFReader(export_gguf(TargetConfig(path=str(tmp_path / "one.gguf")), tmp_path / "two.gguf"))
    assert reader.fields["llama.context_length"].contents() == 64
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    source = {one.name: one for one in gguf.GGUFReader(tmp_path / "one.gguf").tensors}
    for one in reader.tensors:
        run = torch.tensor(gguf.dequantize(source[one.name].data, source[one.name].tensor_type)).bfloat16().float()
        assert torch.equal(torch.tensor(gguf.dequantize(one.data, one.tensor_type)), run)
        assert one.tensor_type.name == ("BF16" if one.name == "matrix" else "F32")
    with pytest.raises(ValueError, match=r"target\.path=folder"):
        export_gguf(TargetConfig(path="folder"), tmp_path / "three.gguf")
    with pytest.raises(ValueError, match=r"target\.dtype=float32"):
        export_gguf(TargetConfig(path=str(tmp_path / "one.gguf"), dtype="float32"), tmp_path / "three.gguf")


LABELS = {
    "target": "t",
    "dtype": "float32",
    "num_prompts": 3,
    "prompts": "p",
    "max_new_tokens": 4,
    "device": "d",
    "versions": {},
}


def test_an_interval_is_seeded_and_needs_two_units() -> None:
    values = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()

    def mean(drawn: list[int]) -> float:
        return sum(values[i] for i in drawn) / len(drawn)

    found = interval(mean, 30)
    assert found is not None and found == interval(mean, 30) != interval(mean, 30, seed=1)
    # As wide as two standard errors to either side, about.
    stderr = (sum((value - mean([*range(30)])) ** 2 for value in values) / 30**2) ** 0.5
    assert found.low < mean([*range(30)]) < found.high and 3.2 < (found.high - found.low) / stderr < 4.6
    assert interval(mean, 1) is None


def test_a_benchmark_with_a_peer(tiny, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    tiny(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained("target")
    tokenizer.save_pretrained("target")
    Path("p.txt").write_text("abcabc\nxyz\n")
    Path("counting.py").write_text(COUNTING)
    words = ["target=hf", "target.path=target", "sampling.max_new_tokens=5", "sampling.ignore_eos=true", "systems=[]"]
    words += ["mixture=[{prompt_file: p.txt, limit: 1}, {prompt_file: p.txt, name: q}]", "transformers=false"]
    words += [f"peers.vllm.python={sys.executable}", f"peers.vllm.worker={tmp_path}/counting.py"]
    assert cli.main(["benchmark", *words, "batch_sizes=[2]", "output=rows.jsonl", "work_dir=work"]) == 0
    assert "3 rows in rows.jsonl, picture in rows.png" in capfd.readouterr().out
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    names = [("specdec", "plain", 2), ("vllm", "plain", 2), ("vllm", "ngram", 2)]
    assert [(row["system"], row["drafter"], row["batch_size"]) for row in rows] == names
    for row in rows:
        assert row["prompts"] == "p+q" and row["num_prompts"] == 3 and row["same_text_as_plain"] == 1
        assert row["peak_memory_bytes"] > 2**20
    assert rows[2]["policy"] == "chain(depth=5)" and rows[2]["versions"]["vllm"] == "1.2.3" and rows[2]["speedup"] == 2
    assert rows[2]["options"]["speculative_config"]["num_speculative_tokens"] == 5 and rows[2]["tau"] == 5 / 3
    # What is handed over can be loaded by anybody.
    assert Path("work/handover/target/config.json").is_file() and Path("work/handover/target/tokenizer.json").is_file()
