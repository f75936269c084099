"""A simulated world for speculation: known acceptance, known costs, a clock that only moves by them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from specdec.cost import CostModel, DraftCost, TargetCost
from specdec.drafters.growth import Grown
from specdec.interfaces import Verdict
from specdec.noise import CounterNoise
from specdec.sampling import SamplingParams
from specdec.scheduler import Plan
from specdec.sequence import Sequence
from specdec.tree import TokenTree

VOCAB = 50


@dataclass
class SimRound:
    """The r-th guess is token r + 1; its confidence is `guesses[row][r]`, at every depth alike."""

    roots_B: torch.Tensor
    limits: list[int]
    guesses_BR: torch.Tensor
    vocab_size: int = VOCAB
    levels: list[int] = field(default_factory=list)

    def expand_root(self):
        return self.expand(self.roots_B[:, None], None, 0)

    def expand(self, tokens_BW, parents_BW, depth):
        live = sum(limit > depth for limit in self.limits)
        self.levels.append(tokens_BW.shape[1] * live)
        self.width = tokens_BW.shape[1]
        return self

    def top(self, k):
        ranks = torch.arange(1, k + 1).expand(len(self.limits), self.width, k)
        return ranks, self.guesses_BR[:, None, :k].log().expand(-1, self.width, -1)

    def laws(self, paths_BWK):
        laws = torch.zeros(len(self.limits), self.width, VOCAB, dtype=torch.float64)
        laws[..., 1] = 1.0
        return laws


class World:
    """`right(row, step)` are the probabilities of the drafter's guesses to be right at any node of that row in that step, and
    `told` what the drafter says of them. Costs are in seconds."""

    def __init__(
        self,
        num_rows: int,
        right: Callable[[int, int], list[float]],
        target_s: Callable[[int], float],
        level_s: float = 0.0,
        node_s: float = 0.0,
        told: Callable[[list[float]], list[float]] = lambda right: right,
        seed: int = 0,
    ) -> None:
        self.now, self.steps, self.tokens = 0.0, 0, 0
        self.right, self.told, self.target_s, self.level_s, self.node_s = right, told, target_s, level_s, node_s
        self.sequences = [
            Sequence(i, [0] * 4, SamplingParams(temperature=1.0), i, None, 1 << 40) for i in range(num_rows)
        ]
        for one in self.sequences:
            one.num_computed = one.root_position
        self.generator = torch.Generator().manual_seed(seed)
        self.drafted: list[list[int]] = []

    def costs(self) -> CostModel:
        knots = (1, 2, 4, 8, 16, 32, 64, 128, 256)
        target = TargetCost(knots, tuple(self.target_s(n) for n in knots))
        return CostModel(target, DraftCost(1e-9, self.level_s, self.node_s))

    def propose(self, sequences, policy, noise) -> TokenTree:
        rows = [one.id for one in sequences]
        guesses = torch.tensor([self.told(self.right(row, self.steps)) for row in rows], dtype=torch.float64)
        limits = [min(policy.max_depth, one.max_draft_depth) for one in sequences]
        draft = SimRound(torch.tensor([one.root for one in sequences]), limits, guesses)
        grown: Grown = policy.grow(draft, noise)
        self.now += self.level_s * len(draft.levels) + self.node_s * sum(draft.levels)
        return grown.tree

    def num_unread(self, sequence: Sequence) -> int:
        return 1

    def step(self, speculation, policy) -> None:
        plan = Plan(self.sequences, [0] * len(self.sequences), self.sequences, [])
        noise = CounterNoise([0] * len(plan.drafting), [self.steps] * len(plan.drafting), [0] * len(plan.drafting))
        start = self.now
        tree = speculation.propose(plan, self, policy, noise)
        self.now += self.target_s(int(tree.num_nodes_B.sum()))
        self.drafted.append((tree.num_nodes_B - 1).tolist())
        paths, tokens = [], []
        for row, one in enumerate(self.sequences):
            probs = torch.tensor(self.right(one.id, self.steps))
            path, emitted = [0], []
            while True:
                u = float(torch.rand((), generator=self.generator))
                token = int((probs.cumsum(0) <= u).sum()) + 1
                emitted.append(token if token <= len(probs) else VOCAB - 1)
                children = (tree.parents_BN[row] == path[-1]) & (tree.tokens_BN[row] == emitted[-1])
                children &= tree.is_node_BN[row]
                if not bool(children.any()):
                    break
                path.append(int(children.int().argmax()))
            paths.append(path)
            tokens.append(emitted)
            one.token_ids += emitted
            one.num_computed = one.root_position
            self.tokens += len(emitted)
        speculation.learn(plan, tree, Verdict(paths, tokens, [None] * len(paths)), self.now - start)
        self.steps += 1

    def run(self, speculation, policy, steps: int, skip: int = 0) -> float:
        """Tokens per second of `steps` steps behind the first `skip`."""
        for _ in range(skip):
            self.step(speculation, policy)
        now, tokens = self.now, self.tokens
        for _ in range(steps):
            self.step(speculation, policy)
        return (self.tokens - tokens) / (self.now - now)


class Always:
    """The given policy in every step."""

    def propose(self, step, drafter, policy, noise) -> TokenTree:
        return drafter.propose(step.drafting, policy, noise)

    def learn(self, step, tree, verdict, seconds) -> None:
        pass
