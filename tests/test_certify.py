"""Certificates as users get them: exact rules pass, wrong ones do not, and the optimum is one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from torch import Tensor

from specdec import cli
from specdec.certificates import certify
from specdec.certificates.checks import TOLERANCE
from specdec.certificates.optimum import optimum
from specdec.certificates.processes import Case, round_laws
from specdec.certificates.worlds import World
from specdec.drafters import Mixed, Sampled, Static, TopK, chain
from specdec.drafters.growth import DraftRound, Grown
from specdec.interfaces import Acceptance, Noise, TargetLaws
from specdec.noise import Key, RoundKey
from specdec.tree import TokenTree, TreeSpec
from specdec.verifiers import Block, Follow, Rejection, Threshold, Traversal


def test_a_lossless_rule_passes_every_check() -> None:
    found = certify(Traversal(), Sampled([2, 1]))
    assert found.passed and found.lossless and found.max_error < TOLERANCE
    assert set(found.errors) == {"round", "pair", "generation", "parameters"}
    assert 1 < found.expected_accepted <= found.optimum + TOLERANCE


def test_the_documented_snippet_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "certificates.md").read_text()
    exec(text.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out.startswith("True ")


def test_a_users_own_wrong_rule_fails() -> None:
    class Greedy:
        """Keeps the first child, whatever the target thinks of it."""

        name, lossless = "greedy", True

        def accepts(self, spec: TreeSpec) -> str | None:
            return None

        def __call__(self, tree: TokenTree, laws: TargetLaws, noise: Noise) -> Acceptance:
            wrong = Threshold(1e-9)(tree, laws, noise)
            return Acceptance(wrong.path_BK, wrong.num_accepted_B, wrong.next_token_B)

    found = certify(Greedy(), chain(1))
    assert not found.passed and found.max_error > 0.1
    assert min(found.errors.values()) > 1e-3


class _OneCoin:
    """Noise whose coins of a round are all the same number."""

    def __init__(self, noise: Noise) -> None:
        self._noise = noise

    def bernoulli(self, prob_B: Tensor, key: RoundKey, rows: Tensor) -> Tensor:
        return self._noise.bernoulli(prob_B, RoundKey("accept", 0), rows)

    def categorical(self, probs_BV: Tensor, key: Key, rows: Tensor) -> Tensor:
        return self._noise.categorical(probs_BV, key, rows)


class OneCoin(Rejection):
    def __call__(self, tree: TokenTree, laws: TargetLaws, noise: Noise) -> Acceptance:
        return super().__call__(tree, laws, _OneCoin(noise))


def test_a_rule_that_cannot_be_enumerated_fails_and_says_why() -> None:
    found = certify(OneCoin(), chain(2, "iid"))
    assert not found.passed and found.max_error == math.inf and math.isnan(found.expected_accepted)
    assert "used twice" in found.faults["round"] and found.faults.keys() <= found.errors.keys()
    # One drafted token needs one coin.
    assert certify(OneCoin(), chain(1, "iid")).passed


def test_a_users_own_policy_needs_no_base_class() -> None:
    class Own:
        def __init__(self) -> None:
            self._inner = Sampled([2, 1])
            self.spec, self.max_depth = self._inner.spec, self._inner.max_depth
            self.max_nodes, self.max_expanded = self._inner.max_nodes, self._inner.max_expanded

        def grow(self, draft: DraftRound, noise: Noise) -> Grown:
            return self._inner.grow(draft, noise)

    found = certify(Traversal(), Own())
    assert found.passed and found == certify(Traversal(), Sampled([2, 1]))


def test_a_wrong_rule_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from specdec.experiments import certify as experiment

    monkeypatch.setattr(experiment, "MUTANTS", [])
    monkeypatch.setattr(experiment, "RULES", {"rejection": OneCoin})
    output = tmp_path / "certificate.json"
    assert cli.main(["certify", "level=full", f"output={output}"]) == 1
    report = json.loads(output.read_text())
    wrong = [row for row in report["rules"] if not row["passed"]]
    assert not report["passed"] and {row["max_error"] for row in wrong} == {None}
    assert all("KeyReusedError" in row["faults"]["round"] for row in wrong)
    wider = {row["tree"]: name for row in report["rules"] for name in row["errors"] if name.startswith("round of")}
    assert wider == {"chain 2": "round of 5", "chain 3 iid": "round of 4"}
    assert "WRONG" in capsys.readouterr().out


def test_a_lossy_rule_is_measured_and_says_so() -> None:
    found = certify(Threshold(), chain(2, "iid"), generations=False)
    assert not found.lossless and found.passed and found.max_error > 0.05
    # No event can differ by less than the most that a single one does.
    assert found.errors["round"] <= found.total_variation < 1
    assert certify(Rejection(), chain(2, "iid"), generations=False).total_variation < TOLERANCE


def test_total_variation_is_that_of_the_joint_law() -> None:
    """One drafted token that is always kept: the law of the first is a point mass, the second follows the target."""
    world = World.tree(3, 3).select("independent")
    (law,) = round_laws(chain(1), Threshold(1e-9), world, [Case(0, 0, 1)])
    drafted = int(world.draft_KCV[0, 0].argmax())
    missing = 1 - float(world.target_KCV[0, 0, drafted])
    assert abs(world.continued_variation(0, 0, law, 2) - missing) < TOLERANCE


def test_a_rule_is_not_certified_for_trees_it_refuses() -> None:
    with pytest.raises(ValueError, match="rule rejection is not exact for this policy"):
        certify(Rejection(), TopK(6, 2, 2))


WORLD_3 = World.tree(3, 5)


@pytest.mark.parametrize("kind", ["sharp", "flat", "close", "independent", "zeros", "disjoint", "equal", "one_hot"])
@pytest.mark.parametrize(
    ("rule", "policy"),
    [
        (Block(), chain(2, "iid")),
        (Block(), chain(3, "iid")),
        (Follow(), chain(2)),
        (Follow(), Static([[0], [1], [0, 0], [1, 0]])),
        (Rejection(), chain(1, "iid")),
    ],
)
def test_optimal_rules_reach_the_optimum(rule: Block | Follow | Rejection, policy: Sampled | Static, kind: str) -> None:
    """Block verification on sampled chains, following on FIXED trees: the published optima."""
    case = Case(WORLD_3.kinds.index(kind), 0, policy.max_depth)
    (law,) = round_laws(policy, rule, WORLD_3, [case])
    assert abs(sum(prob * len(span) for span, prob in law.items()) - optimum(policy, WORLD_3, case)) < 1e-7


@pytest.mark.parametrize("kind", ["sharp", "close", "independent", "zeros", "disjoint"])
def test_one_draw_can_do_no_better_than_the_overlap(kind: str) -> None:
    number = WORLD_3.kinds.index(kind)
    overlap = float(WORLD_3.target_KCV[number, 0].minimum(WORLD_3.draft_KCV[number, 0]).sum())
    assert abs(optimum(chain(1, "iid"), WORLD_3, Case(number, 0, 1)) - (1 + overlap)) < 1e-7


@pytest.mark.parametrize("policy", [Sampled([2]), Sampled([2, 1], "without_replacement"), Mixed([2, 1])])
def test_no_rule_beats_the_optimum(policy: Sampled) -> None:
    for kind in range(len(WORLD_3.kinds)):
        case = Case(kind, 0, policy.max_depth)
        (law,) = round_laws(policy, Traversal(), WORLD_3, [case])
        assert sum(prob * len(span) for span, prob in law.items()) < optimum(policy, WORLD_3, case) + 1e-7


def test_the_command_writes_a_certificate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "certificate.json"
    assert cli.main(["certify", f"output={output}"]) == 0
    report = json.loads(output.read_text())
    assert report["passed"] and report["command"].startswith("specdec certify") and report["versions"]["torch"]
    assert all(row["max_error"] < TOLERANCE for row in report["rules"] if row["lossless"])
    lossy = [row for row in report["rules"] if not row["lossless"]]
    assert {row["rule"] for row in lossy} == {"typical", "threshold"}
    assert all(row["total_variation"] > 0.1 for row in lossy) and report["real"] == [] and report["numerics"] == {}
    fields = {"rule", "kind", "tree", "max_error", "expected_accepted", "optimum"}
    assert all(fields <= set(row) and math.isfinite(row["optimum"]) for row in report["rules"])
    assert len(report["mutants"]) >= 25 and all(row["caught"] and row["by"] for row in report["mutants"])
    assert output.with_suffix(".png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "LOSSY" in out and f"TV {lossy[0]['total_variation']:.3f}" in out and "passed" in out


def test_a_certificate_that_misses_a_mutant_is_not_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from specdec.certificates.catalogue import MUTANTS
    from specdec.experiments import certify as experiment

    one = MUTANTS[0]
    harmless = type(one)("nothing changed", one.function, one.old, one.old, one.check)
    monkeypatch.setattr(experiment, "MUTANTS", [harmless])
    output = tmp_path / "certificate.json"
    assert cli.main(["certify", "rules=[follow]", f"output={output}"]) == 1
    assert not json.loads(output.read_text())["passed"]
    assert "missed: nothing changed" in capsys.readouterr().out


@pytest.mark.parametrize(("word", "part"), [("level=slow", "level='slow'"), ("rules=[fellow]", "'fellow'")])
def test_an_unknown_level_or_rule_is_one_line(word: str, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["certify", word]) == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1
