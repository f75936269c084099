"""Every rule's verdict on one and the same tree, many times over."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from torch import Tensor

from specdec.drafters import Coupled as CoupledPolicy
from specdec.experiments.replay import Scene
from specdec.interfaces import AcceptanceRule, TargetLaws, TreePolicy
from specdec.noise import CounterNoise
from specdec.tree import TokenTree
from specdec.verifiers import RULES, Coupled


class Jury:
    """The rules that are exact for a policy's trees, and those that are lossy. Raises ValueError where there is none."""

    def __init__(self, label: str, policy: TreePolicy, rules: Seq[AcceptanceRule]) -> None:
        refused = {rule.name: rule.accepts(policy.spec) for rule in rules}
        self.rules = [rule for rule in rules if refused[rule.name] is None]
        if not self.rules:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
            raise ValueError(f"no rule is exact for {label} ({reasons})")
        reference = "rejection" if policy.spec.is_chain else "recursive"
        # What the others are compared with, where it is among them.
        self.reference = reference if reference in [rule.name for rule in self.rules] else None
        self._is_coupled = isinstance(policy, CoupledPolicy)

    def taus(self, scene: Scene, seeds: Seq[int]) -> dict[str, float]:
        """Per rule the mean number of tokens that the tree gives, the extra one included, over the noise of these seeds."""
        tree = repeated(scene.tree, len(seeds))
        laws = RepeatedLaws(scene.laws, len(seeds))
        taus = {}
        for rule in self.rules:
            # A coupled tree was drafted by looking at the noise that its rule draws with, so no other will do.
            is_drafted_for = self._is_coupled and isinstance(rule, Coupled)
            places = [scene.root] * len(seeds)
            noise = CounterNoise([scene.seed] * len(seeds) if is_drafted_for else seeds, places, places, tree.device)
            taus[rule.name] = 1 + rule(tree, laws, noise).num_accepted_B.double().mean().item()
        return taus


class RepeatedLaws:
    """The laws of one tree for every row of a batch that repeats it; computed once, shared without a copy."""

    def __init__(self, laws: TargetLaws, count: int) -> None:
        self._laws_1NV, self._count = laws.all(), count

    def at(self, nodes_B: Tensor) -> Tensor:
        return self._laws_1NV[0, nodes_B]

    def all(self) -> Tensor:
        return self._laws_1NV.expand(self._count, -1, -1)


def repeated(tree: TokenTree, count: int) -> TokenTree:
    """A single tree as `count` rows; their draft laws share memory."""
    assert tree.batch_size == 1, "one tree at a time is repeated"
    laws = tree.draft_laws_BNV
    return TokenTree(
        tree.tokens_BN.repeat(count, 1),
        tree.parents_BN.repeat(count, 1),
        tree.num_nodes_B.repeat(count),
        tree.draws_BM.repeat(count, 1),
        tree.kinds_BM.repeat(count, 1),
        None if laws is None else laws.expand(count, -1, -1),
        tree.adapted,
        tree.vocab_size,
    )


def chosen_rules(names: Seq[str], allow_lossy: bool) -> list[AcceptanceRule]:
    """Rules by name (none: all), lossy ones where they are allowed.

    Raises ValueError for a name that is no rule's, or a lossy rule's that was not allowed.
    """
    for name in names:
        if name not in RULES:
            raise ValueError(f"rules: {name!r} is unknown; choose among {', '.join(RULES)}")
        if not RULES[name].lossless and not allow_lossy:
            raise ValueError(f"rules: {name} is LOSSY: its output does not follow the target's law; allow_lossy=true")
    return [rule() for name, rule in RULES.items() if (name in names if names else rule.lossless or allow_lossy)]
