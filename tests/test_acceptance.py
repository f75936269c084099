"""Acceptance lengths on common drafts: what rules are shown, what is averaged, and what the command writes."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence as Seq
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from specdec import PagedModel, SamplingParams, cli
from specdec.drafters import Coupled as CoupledPolicy
from specdec.drafters import Mixed, NGramDrafter, Sampled, SmallModelDrafter, TopK, chain
from specdec.experiments import acceptance
from specdec.experiments.estimates import clustered_mean
from specdec.experiments.jury import Jury, chosen_rules
from specdec.experiments.replay import Replay, Scene
from specdec.interfaces import Acceptance, Commit, Noise, TargetLaws, TreePolicy
from specdec.tracking import JsonlTracker
from specdec.tree import TokenTree, TreeSpec
from specdec.verifiers import RULES

TEXT = [5, 17, 8, 8, 40, 61, 5, 17, 8, 33, 12, 5, 17, 90, 2, 41, 7, 7, 7, 23]
PROMPT, OUTPUT = TEXT[:6], TEXT[6:]
ROOTS = [6, 7, 11, 16, 18]
PARAMS = SamplingParams(temperature=0.8, seed=3)
POLICIES: dict[str, TreePolicy] = {
    "chain": chain(4, "iid"),
    "chain_fixed": chain(4),
    "again": chain(4, "iid"),
    "bush": Sampled([2, 2], "without_replacement"),
    "mixed": Mixed([3, 1]),
    "top_k": TopK(total=8, depth=3, k=2),
    "coupled": CoupledPolicy(total=8, depth=3, k=2),
}
FIELDS = set(
    """experiment system target drafter policy rule num_nodes mean_num_nodes prompts temperature batch_size dtype device tau
    tau_stderr difference difference_stderr reference_rule num_prompts num_contexts num_repeats seed lossless command
    revision versions date""".split()  # noqa: SIM905
)


@pytest.fixture(scope="module")
def pair(tiny) -> SimpleNamespace:
    """Target and draft model, over pages and as transformers has them."""
    target, draft = tiny(), tiny(noise=0.02)
    replay = Replay(PagedModel(tiny()), SmallModelDrafter(PagedModel(tiny(noise=0.02))), page_size=4, prefill_chunk=3)
    return SimpleNamespace(target=target, draft=draft, replay=replay)


@pytest.fixture(scope="module")
def scenes(pair) -> list[Scene]:
    return list(pair.replay.scenes(PROMPT, OUTPUT, ROOTS, PARAMS, 9, POLICIES))


def law(model: torch.nn.Module, context: Seq[int]) -> torch.Tensor:
    """What transformers itself says follows a context, at the test's temperature."""
    with torch.inference_mode():
        return (model(torch.tensor([context])).logits[0, -1] / PARAMS.temperature).softmax(-1)


def path_tokens(tree: TokenTree, node: int) -> list[int]:
    return [int(tree.tokens_BN[0, n]) for n in tree.path(node)[1:]]


def accepted_law(pair: SimpleNamespace, scene: Scene, rule: str) -> list[float]:
    """P(at least k drafted tokens stay), k = 1, 2, ..., given the tree: from transformers' laws and the rule's definition."""
    tree, context = scene.tree, TEXT[: scene.root + 1]
    deepest = int(tree.depth_BN.max())
    reach = [1.0] + [0.0] * deepest
    stays = {0: 1.0}
    for node in range(1, int(tree.num_nodes_B[0])):
        parent, token = int(tree.parents_BN[0, node]), int(tree.tokens_BN[0, node])
        above = context + path_tokens(tree, parent)
        p = float(law(pair.target, above)[token])
        is_drawn = tree.draft_laws_BNV is not None
        share = p if rule == "follow" else min(1, p / (float(law(pair.draft, above)[token]) if is_drawn else 1))
        stays[node] = stays[parent] * share
        reach[int(tree.depth_BN[0, node])] += stays[node]
    return reach[1:]


def test_every_policy_stands_at_every_root(scenes: list[Scene]) -> None:
    assert [(scene.root, scene.policy) for scene in scenes] == [(root, name) for root in ROOTS for name in POLICIES]
    assert all(scene.tree.tokens_BN[0, 0] == TEXT[scene.root] for scene in scenes)
    assert all(scene.tree.depth_BN.max() == POLICIES[scene.policy].max_depth for scene in scenes)


def test_laws_are_those_of_the_text_and_the_path(pair, scenes: list[Scene]) -> None:
    for scene in scenes:
        laws = scene.laws.all()[0]
        for node in range(int(scene.tree.num_nodes_B[0])):
            context = TEXT[: scene.root + 1] + path_tokens(scene.tree, node)
            torch.testing.assert_close(laws[node], law(pair.target, context))
        for node in range(4 if scene.policy == "chain" else 0):
            context = TEXT[: scene.root + 1] + path_tokens(scene.tree, node)
            torch.testing.assert_close(scene.tree.draft_laws_BNV[0, node], law(pair.draft, context))


def test_a_tree_depends_on_no_other_policy(pair, scenes: list[Scene]) -> None:
    trees = {(scene.root, scene.policy): scene.tree.tokens_BN for scene in scenes}
    alone = list(pair.replay.scenes(PROMPT, OUTPUT, ROOTS[2:], PARAMS, 9, {"mixed": POLICIES["mixed"]}))
    for scene in alone:
        assert torch.equal(scene.tree.tokens_BN, trees[scene.root, "mixed"])
    assert all(torch.equal(trees[root, "chain"], trees[root, "again"]) for root in ROOTS)
    assert len({str(trees[root, "chain"][:, 1:]) for root in ROOTS}) > 1
    other = next(pair.replay.scenes(PROMPT, OUTPUT, ROOTS, PARAMS, 10, POLICIES))
    assert not torch.equal(other.tree.tokens_BN, trees[ROOTS[0], "chain"])


def test_pages_are_given_back(pair, scenes: list[Scene]) -> None:
    walk = pair.replay.scenes(PROMPT, OUTPUT, ROOTS, PARAMS, 9, POLICIES)
    next(walk)
    walk.close()
    assert pair.replay._pool.num_free == pair.replay._pool.num_pages > 0


def test_any_drafter_can_be_led(tiny) -> None:
    replay = Replay(PagedModel(tiny()), NGramDrafter())
    (scene,) = replay.scenes(PROMPT, OUTPUT, [12], PARAMS, 0, {"chain": chain(2)})
    # 5 17 came before twice, the later time with 8 33 behind it.
    assert scene.tree.tokens_BN.tolist() == [[17, 8, 33]]


def test_drafters_see_every_final_token_with_its_features(tiny) -> None:
    class Watcher:
        feature_layers = (1,)

        def __init__(self) -> None:
            self.commits: list[Commit] = []

        def bind(self, target, pool) -> None: ...

        def observe(self, commits: Seq[Commit]) -> None:
            self.commits += commits

        def propose(self, sequences, policy, noise) -> TokenTree:
            return TokenTree.roots(torch.tensor([one.root for one in sequences]))

        def forget(self, sequence_ids) -> None: ...

    watcher = Watcher()
    assert len(
        list(Replay(PagedModel(tiny()), watcher, prefill_chunk=5).scenes(PROMPT, OUTPUT, [8, 9], PARAMS, 0, POLICIES))
    )
    assert [(one.start, one.token_ids, one.next_token) for one in watcher.commits] == [
        (0, TEXT[:5], TEXT[5]),
        (5, TEXT[5:8], TEXT[8]),
        (8, TEXT[8:9], TEXT[9]),
    ]
    with torch.inference_mode():
        states = tiny()(torch.tensor([TEXT]), output_hidden_states=True).hidden_states[1][0]
    torch.testing.assert_close(torch.cat([one.hidden[1] for one in watcher.commits]), states[:9])


@pytest.mark.parametrize(("rule", "policy"), [("rejection", "chain"), ("rejection", "chain_fixed"), ("follow", "bush")])
def test_tau_is_what_direct_computation_expects(rule: str, policy: str, pair, scenes: list[Scene]) -> None:
    repeats = 500
    jury = Jury(policy, POLICIES[policy], [RULES[rule]()])
    error = variance = 0.0
    for scene in (one for one in scenes if one.policy == policy):
        reach = accepted_law(pair, scene, rule)
        expected = sum(reach)
        error += jury.taus(scene, range(100, 100 + repeats))[rule] - (1 + expected)
        # E[A^2] is the sum over k of (2k - 1) P(A >= k).
        variance += (sum((2 * k + 1) * prob for k, prob in enumerate(reach)) - expected**2) / repeats
    assert variance > 0
    assert abs(error) < 4 * math.sqrt(variance)


def test_rules_judge_the_very_same_drafts(scenes: list[Scene]) -> None:
    class Spy:
        lossless = True

        def __init__(self, name: str) -> None:
            self.name = name

        def accepts(self, spec: TreeSpec) -> None:
            return None

        def __call__(self, tree: TokenTree, laws: TargetLaws, noise: Noise) -> Acceptance:
            self.seen = [
                tree.tokens_BN,
                tree.parents_BN,
                tree.draws_BM,
                tree.kinds_BM,
                laws.all(),
                laws.at(tree.num_nodes_B - 1),
            ]
            self.seen += [] if tree.draft_laws_BNV is None else [tree.draft_laws_BNV]
            self.seen = [tensor.clone() for tensor in self.seen]
            root_B = torch.zeros_like(tree.num_nodes_B)
            return Acceptance(root_B[:, None], root_B, root_B)

    for scene in scenes:
        first, last = Spy("first"), Spy("last")
        taus = Jury(scene.policy, POLICIES[scene.policy], [first, *chosen_rules([], True), last]).taus(scene, [1, 2, 3])
        assert taus["first"] == taus["last"] == 1 and len(taus) >= 6
        assert len(first.seen) == len(last.seen)
        for before, after in zip(first.seen, last.seen, strict=True):
            assert len(before) == 3 and torch.equal(before, after)
        torch.testing.assert_close(first.seen[4], scene.laws.all().expand_as(first.seen[4]), rtol=0, atol=0)


def test_a_draft_model_that_is_the_target_is_always_right(tiny) -> None:
    replay = Replay(PagedModel(tiny()), SmallModelDrafter(PagedModel(tiny())))
    policies = {name: POLICIES[name] for name in ("chain", "coupled")}
    for scene in replay.scenes(PROMPT, OUTPUT, ROOTS, PARAMS, 4, policies):
        taus = Jury(scene.policy, policies[scene.policy], chosen_rules([], False)).taus(scene, range(20))
        if scene.policy == "chain":
            for name in ("rejection", "block", "recursive", "traversal", "kseq"):
                assert taus[name] == pytest.approx(5, abs=1e-3)
        else:
            assert taus["coupled"] == 4 and taus["follow"] < 4


def test_block_and_traversal_accept_more(pair) -> None:
    policies = {"chain": chain(6, "iid"), "tree": Sampled([2, 2, 1])}
    juries = {name: Jury(name, policy, chosen_rules([], False)) for name, policy in policies.items()}
    gains: dict[tuple[str, str], list[float]] = {}
    for seed in range(8):
        for scene in pair.replay.scenes(PROMPT, OUTPUT, range(6, 19, 3), PARAMS, seed, policies):
            jury = juries[scene.policy]
            taus = jury.taus(scene, range(16))
            for rule in ("block", "traversal") if scene.policy == "chain" else ("traversal",):
                gains.setdefault((scene.policy, rule), []).append(taus[rule] - taus[jury.reference])
    assert len(gains) == 3 and all(statistics.fmean(values) > 0 for values in gains.values())


def test_clusters_share_their_errors() -> None:
    values = [1.0, 4.0, 2.0, 7.0]
    apart = clustered_mean([[value] for value in values])
    assert apart.mean == 3.5 and apart.stderr == pytest.approx(statistics.stdev(values) / 2)
    # Values that only repeat one another tell no more than one of them.
    assert clustered_mean([[value] * 5 for value in values]) == apart
    assert clustered_mean([[1.0, 2.0], [6.0], []]).stderr == pytest.approx(math.sqrt(2 * (3**2 + 3**2)) / 3)
    assert clustered_mean([[1.0, 2.0]]).stderr is None
    with pytest.raises(ValueError, match="nothing"):
        clustered_mean([[], []])


@pytest.fixture(scope="module")
def folder(tiny, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, noise in {"target": 0.0, "draft": 0.02}.items():
        tiny(vocab_size=len(tokenizer), noise=noise, max_position_embeddings=512).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch, capfd):
    """Runs the command on the tiny pair; its status, stdout, stderr and the rows of `output`."""
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("abcabc\nxyz\nhello\n")
    policies = [
        "drafter/policy=chain drafter.policy.depth=4 drafter.policy.kind=iid",
        "drafter/policy=sampled drafter.policy.branching=[2,1] drafter.policy.kind=without_replacement",
    ]
    words = ["target=hf", f"target.path={folder}/target", f"draft={folder}/draft", "prompt_file=p.txt", "limit=2"]
    words += ["temperatures=[0.5,1.0]", f"policies={json.dumps(policies)}", "sampling.max_new_tokens=14", "stride=4"]
    words += ["sampling.ignore_eos=true", "num_repeats=3"]

    def run(*more: str, output: str = "rows.jsonl"):
        status = cli.main(["acceptance", *words, f"output={output}", *more])
        out, err = capfd.readouterr()
        found = Path(output).read_text().splitlines() if Path(output).exists() else []
        return status, out, err, [json.loads(line) for line in found]

    return run


def measured(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in ("command", "date", "revision")} for row in rows]


def test_command_writes_a_row_per_temperature_policy_and_rule(run) -> None:
    status, out, err, rows = run()
    assert status == 0 and err == ""
    chains = ["follow", "rejection", "block", "recursive", "traversal", "kseq", "coupled"]
    trees = ["follow", "recursive", "traversal", "coupled"]
    assert [(row["temperature"], row["rule"]) for row in rows] == [(t, r) for t in (0.5, 1.0) for r in chains + trees]
    for row in rows:
        assert set(row) >= FIELDS
        assert row["experiment"] == "acceptance" and row["drafter"] == "small_model(draft)" and row["lossless"]
        assert row["num_prompts"] == 2 and 6 <= row["num_contexts"] <= 8 and row["num_repeats"] == 3
        assert 1 <= row["tau"] <= row["mean_num_nodes"] <= row["num_nodes"] == 5
        assert row["tau_stderr"] >= 0 and row["sampling"] == {"ignore_eos": True}
    for row in rows:
        reference = {"chain": "rejection", "sampled": "recursive"}[row["policy"].partition("(")[0]]
        (other,) = (one for one in rows if one | {"rule": reference} == one and same_drafts(one, row))
        assert row["reference_rule"] == reference
        assert row["difference"] == pytest.approx(row["tau"] - other["tau"])
    assert "chain(depth=4, kind=iid)" in out and "difference to" in out and "LOSSY" not in out
    assert Path("rows.png").read_bytes().startswith(b"\x89PNG")


def same_drafts(row: dict, other: dict) -> bool:
    return all(row[key] == other[key] for key in ("temperature", "policy"))


def test_lossy_rules_are_asked_for_and_named(run) -> None:
    _, out, _, rows = run("allow_lossy=true", "rules=[typical,follow]", "temperatures=[1.0]", "limit=1")
    assert [(row["rule"], row["lossless"]) for row in rows] == [("follow", True), ("typical", False)] * 2
    assert all(row["reference_rule"] is row["difference"] is row["difference_stderr"] is None for row in rows)
    assert all(row["tau_stderr"] is None for row in rows)
    assert "typical LOSSY" in out and "± ?" in out


def test_interrupted_run_goes_on_and_gives_the_same_rows(run, monkeypatch) -> None:
    whole = run(output="whole.jsonl")[3]
    write = JsonlTracker.row

    def stop_after_two(self: JsonlTracker, row: dict) -> None:
        write(self, row)
        if row.get("prompt") == 0 and row["temperature"] == 1.0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(JsonlTracker, "row", stop_after_two)
        status, _, err, rows = run("work_dir=.")
    assert status == 130 and "work_dir=." in err and not rows
    visited = []
    visit = acceptance.Visitor.visit
    monkeypatch.setattr(acceptance.Visitor, "visit", lambda self, *args: visited.append(args[1]) or visit(self, *args))
    _, _, _, rows = run("work_dir=.")
    assert visited == [0.5, 1.0] and measured(rows) == measured(whole)
    # Other settings are other measurements.
    run("work_dir=.", "stride=5")
    assert len(visited) == 6


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("policies=['drafter/policy=tree']", ["drafter/policy=tree", "chain, "]),
        ("policies=['drafter.policy.totl=3']", ["drafter.policy.total"]),
        ("policies=['rule=block']", ["rule=block", "drafter/policy="]),
        ("policies=['drafter/policy=sampled drafter.policy.branching=[0]']", ["branching=[0]"]),
        ("policies=[]", ["policies"]),
        ("rules=[blok]", ["'blok'", "block, "]),
        ("rules=[typical]", ["typical", "allow_lossy=true"]),
        ("rules=[block]", ["no rule is exact for sampled(", "branch"]),
        ("drafter/policy=chain", ["drafter/policy=chain", "policies="]),
        ("sampling.temperature=1", ["sampling.temperature=1", "temperatures="]),
        ("temperatures=[-1]", ["temperature=-1"]),
        ("stride=0", ["stride=0"]),
        ("sampling.max_new_tokens=1", ["max_new_tokens=1"]),
        ("drafter=none", ["drafter=none"]),
        ("draft=null", ["draft="]),
        ("prompt_file=null", ["prompt_file"]),
    ],
)
def test_error_is_one_line_before_a_model_is_loaded(word: str, parts: list[str], run, monkeypatch) -> None:
    monkeypatch.setattr(acceptance, "load_target", lambda config: pytest.fail("the model was loaded"))
    status, out, err, rows = run(word)
    assert status == 2 and out == "" and not rows
    assert err.startswith("specdec: error: ") and err.count("\n") == 1
    assert all(part in err for part in parts), err
