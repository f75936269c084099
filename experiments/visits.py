"""A visit: the target writes a text, then every policy's trees are grown and judged along it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from specdec.engine import Engine
from specdec.experiments.jury import Jury
from specdec.experiments.replay import Replay
from specdec.experiments.resume import digest
from specdec.interfaces import TreePolicy
from specdec.sampling import SamplingParams


@dataclass
class Visit:
    """One text and what was seen along it: per policy the nodes of each tree, per policy and rule each tree's mean tau."""

    output: list[int]
    roots: list[int]
    num_nodes: dict[str, list[int]] = field(default_factory=dict)
    taus: dict[str, dict[str, list[float]]] = field(default_factory=dict)


@dataclass
class Visitor:
    """Has the target write the text behind a prompt by plain decoding, then goes along it; a root every `stride` tokens, each
    tree judged with `num_repeats` seeds. All chance comes from `params.seed` and the prompt."""

    plain: Engine
    replay: Replay
    policies: dict[str, TreePolicy]
    juries: dict[str, Jury]
    params: SamplingParams
    stride: int
    num_repeats: int

    def visit(self, prompt: list[int], temperature: float, on_root: Callable[[int, int], None]) -> Visit:
        params = replace(self.params, temperature=temperature, seed=self._seed("text", prompt))
        output = self.plain.generate([prompt], params)[0].token_ids
        # The first drafted tree grows from the first new token; none grows from the last.
        places = len(output) - 1
        start = self._seed("start", prompt) % max(min(self.stride, places), 1)
        roots = [len(prompt) + place for place in range(start, places, self.stride)]
        visit = Visit(
            output,
            roots,
            {label: [] for label in self.policies},
            {label: {rule.name: [] for rule in jury.rules} for label, jury in self.juries.items()},
        )
        seeds = [self._seed("accept", prompt, repeat) for repeat in range(self.num_repeats)]
        for scene in self.replay.scenes(prompt, output, roots, params, self._seed("draft", prompt), self.policies):
            on_root(roots.index(scene.root) + 1, len(roots))
            visit.num_nodes[scene.policy].append(int(scene.tree.num_nodes_B[0]))
            for name, tau in self.juries[scene.policy].taus(scene, seeds).items():
                visit.taus[scene.policy][name].append(tau)
        return visit

    def _seed(self, purpose: str, prompt: list[int], index: int = 0) -> int:
        """Prompts are clusters: nothing may tie them together, so each has seeds of its own."""
        return int(digest(self.params.seed, purpose, prompt, index), 16)
