"""Adaptive speculation: every step drafts and verifies what is worth its time, down to nothing."""

from __future__ import annotations

import operator
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from specdec.cost import Array, CostModel, DraftSize, TargetSize
from specdec.drafters.choosing import Choice, Ints, Load, Options, choose, instead, keep_best, may_pay
from specdec.drafters.found import Found
from specdec.drafters.outlook import Outcome, RequestRecord, Scores, outlook_for
from specdec.drafters.payoff import Payoff
from specdec.drafters.pruning import prune, shallower
from specdec.drafters.union import UnionDrafter
from specdec.int_tensor import int_tensor
from specdec.interfaces import Noise, PagedDrafter, TreePolicy, Verdict
from specdec.scheduler import Plan
from specdec.sequence import Sequence
from specdec.tree import TokenTree, TreeSpec


@dataclass
class SpeculationCounts:
    """What was chosen since the start: rows that could be drafted for, those that were, and the drafted nodes that were
    verified and that were pruned; `explored_s` is what looking elsewhere was expected to cost."""

    num_rows: int = 0
    num_drafted: int = 0
    num_nodes: int = 0
    num_pruned: int = 0
    explored_s: float = 0.0


@dataclass(frozen=True)
class _Step:
    """What `learn` must know of the step that was proposed; `looked_s` went by until it had its trees."""

    sequences: list[Sequence]
    load: Load
    depths: list[int]
    scores: Scores | None = None
    option: int = 0
    draft: DraftSize | None = None
    draft_s: float = 0.0
    looked_s: float = 0.0


class AdaptiveSpeculation:
    """Chooses trees for the most tokens per second over the whole batch, from costs and acceptance as they were seen so far.

    Before drafting each row gets a depth (0: it decodes plainly) and drawn trees a width; FIXED trees are pruned once more
    after drafting, jointly over the batch (as the confidence trees of EAGLE-2, with the price of a node in place of their
    total). Choices rest on the past alone, on this step's draft only where it holds nothing drawn, so every law is kept.
    `explore` is the share of time that may be spent to look at what seems not to pay. `accepts` is the rule's.

    A choice to draft is followed for up to `longest_habit` steps more of the same sequences without prompts: next to a forward
    for a few rows, choosing takes longer than it would win so soon. Unless ready-made drafts turn up, see below.
    As long as nothing pays, steps of much the same sequences follow without a choice: one, then three, then seven, up to
    `_LONGEST_REST` each time, and so many at once where even drafts without a mistake would not pay. Of a union those drafters
    that need no model are asked even then, for that is as good as free: what they find is verified as far as it pays by itself,
    and where there is a choice it says whether to ask the others too.
    """

    _KINDS = ("wake", "deepen", "plain")
    _LONGEST_REST = 31
    # What a drafter must read before it drafts serves the drafts to come: its price is spread over so many steps.
    _HORIZON = 16
    # Where drafts did not pay, one of so many steps without them is measured.
    _WATCHED = 4
    # In one of so many steps what is there is looked at whatever it may be worth: guesses must be seen to get better.
    _LOOK_AT_ALL = 16

    def __init__(
        self,
        policy: TreePolicy,
        costs: CostModel,
        accepts: Callable[[TreeSpec], str | None] = lambda spec: None,
        *,
        device: torch.device | str = "cpu",
        explore: float = 0.01,
        longest_habit: int = 3,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.costs, self.counts = costs, SpeculationCounts()
        self._policy, self._outlook = policy, outlook_for(policy, accepts)
        self._records: weakref.WeakKeyDictionary[Sequence, RequestRecord] = weakref.WeakKeyDictionary()
        self._device, self._explore, self._clock = device, explore, clock
        # Unknown until the first step has taken its time: a step's worth of looking elsewhere is granted to begin with.
        self._savings: dict[str, float] = {}
        # Which kind of look is next.
        self._turns = [*self._KINDS]
        self._last: _Step | None = None
        # Whose steps go on without a choice, how many still do, and how many did the last time.
        self._resting: set[Sequence] = set()
        self._rest = self._last_rest = 0
        # The last choice if others may follow it, whose it was, and how many steps still may.
        self._habit: Choice | None = None
        self._drafting: list[Sequence] = []
        self._longest_habit, self._habit_left = longest_habit, 0
        self._num_looks = 0
        # Whoever may not look elsewhere cannot try drafts either.
        self._payoff = Payoff(explore) if explore else None
        # Steps whose share for looks elsewhere has not been saved up yet.
        self._num_unsaved = 0
        share = (policy.max_expanded - 1) / max(policy.max_depth - 1, 1)
        levels = np.arange(policy.max_depth + 1)
        # The root is run once; the levels behind it are taken to be alike.
        self._expanded_D = np.where(levels > 0, 1 + (levels - 1) * share, 0.0)

    def propose(self, step: Plan, drafter: PagedDrafter, policy: TreePolicy, noise: Noise) -> TokenTree:
        """Trees for `step.drafting`. Raises ValueError for another policy than the one that this was made for."""
        if policy is not self._policy:
            raise ValueError("adaptive speculation was set up for another policy: make one for each engine")
        sequences, load = step.drafting, _load(step)
        if self._payoff and self._payoff.rests(len(sequences), bool(load.num_prompt)):
            return self._roots(sequences, load)
        began = self._clock()
        found = (
            Found(drafter, sequences, policy, noise, self._least(load)) if isinstance(drafter, UnionDrafter) else None
        )
        ready, choice, looked = None if found is None else found.scores, None, found is not None
        if self._rest and self._knows(sequences):
            self._rest -= 1
        elif found is None or not found.is_all:
            choice = self._as_before(sequences, load, ready)
            if choice is None:
                choice = self._choose(sequences, drafter, load, ready)
            looked = True
        if choice is None and ready is None:
            return self._roots(sequences, load, self._clock() - began if looked else 0.0)
        depths: list[int] = [0] * len(sequences) if choice is None else choice.depths_B.tolist()
        scores: Scores | None
        start = self._clock()
        size = self._draft_size(sequences, drafter, depths)
        if found is not None:
            rate = None if choice is None else choice.rate
            scores, tree = found.drafted(depths, lambda probs_BN: keep_best(probs_BN, load, self.costs, rate))
        else:
            assert choice is not None, "without a choice only what is there already is verified"
            scores, tree = self._draft(sequences, depths, choice, load, drafter, noise)
        seconds = self._clock() - start
        for one, depth in zip(sequences, depths, strict=True):
            if depth:
                self._records[one].drafted_len = len(one.token_ids)
        option, draft_s = (0, 0.0) if choice is None else (choice.option, seconds)
        self._last = _Step(sequences, load, depths, scores, option, size, draft_s, self._clock() - began)
        self._count(depths, scores, tree)
        return tree

    def _roots(self, sequences: list[Sequence], load: Load, looked_s: float = 0.0) -> TokenTree:
        self._last = _Step(sequences, load, [0] * len(sequences), looked_s=looked_s)
        self.counts.num_rows += len(sequences)
        return TokenTree.roots(int_tensor([one.root for one in sequences])).to(self._device)

    def _least(self, load: Load) -> float:
        """How likely a node must be to be right for any number of such nodes to be worth their time."""
        self._num_looks += 1
        if self._num_looks % self._LOOK_AT_ALL == 0:
            return 0.0
        counts = np.arange(load.num_emitting * (self._policy.max_nodes - 1) + 1.0)
        rows = np.append(load.num_rows - load.num_prompt, load.num_rows + counts)
        plain_s, *seconds = self.costs.step_s(rows, load.num_sequences, load.context)
        # A token is worth at least the time that plain decoding takes for it.
        return load.num_emitting / float(plain_s) * float(np.diff(seconds).min())

    def _knows(self, sequences: list[Sequence]) -> bool:
        """Whether about as many run as when the rest began, and half of them did then: of a new one no more is known than of
        the others at that time, so that each that comes or goes need not end all rest."""
        size, num_known = len(self._resting), sum(one in self._resting for one in sequences)
        return 4 * abs(len(sequences) - size) < size and 2 * num_known >= len(sequences)

    def _as_before(self, sequences: list[Sequence], load: Load, ready: Scores | None) -> Choice | None:
        """The last choice, where nothing has changed but the texts and it was made a few steps ago."""
        if self._habit is None or not self._habit_left or load.num_prompt or ready is not None:
            return None
        if len(sequences) != len(self._drafting) or any(map(operator.is_not, sequences, self._drafting)):
            return None
        self._habit_left -= 1
        limits_B = np.array([one.max_draft_depth for one in sequences])
        return replace(self._habit, depths_B=np.minimum(self._habit.depths_B, limits_B))

    def _choose(
        self, sequences: list[Sequence], drafter: PagedDrafter, load: Load, ready: Scores | None
    ) -> Choice | None:
        """What to draft; None where that is nothing, and then the next steps rest."""
        limits_B = np.array([min(one.max_draft_depth, self._policy.max_depth) for one in sequences])
        if not may_pay(limits_B, self._expanded_D, load, self.costs):
            self._begin_rest(sequences, self._LONGEST_REST)
            return None
        records = [self._record(one) for one in sequences]
        options = self._options(sequences, records, limits_B, drafter, ready)
        slept = [len(one.token_ids) - record.drafted_len for one, record in zip(sequences, records, strict=True)]
        best = choose(options, load, self.costs)
        choice = self._look_elsewhere(options, load, best, np.array(slept, dtype=float))
        is_habit = choice is best and ready is None and not load.num_prompt and bool(best.depths_B.any())
        self._habit, self._drafting = (best, list(sequences)) if is_habit else (None, [])
        self._habit_left = self._longest_habit
        if best.depths_B.any():
            # A look at a plain step is no reason to rest: it would be many, and none of them accounted for.
            self._rest = self._last_rest = 0
        elif not choice.depths_B.any():
            before = self._last_rest if self._knows(sequences) else 0
            self._begin_rest(sequences, min(2 * before + 1, self._LONGEST_REST))
        return choice if choice.depths_B.any() else None

    def _record(self, one: Sequence) -> RequestRecord:
        record = self._records.get(one)
        if record is None:
            record = self._records[one] = self._outlook.record()
        return record

    def _begin_rest(self, sequences: list[Sequence], num_steps: int) -> None:
        self._rest = self._last_rest = num_steps
        self._resting = set(sequences)

    def _draft_size(self, sequences: list[Sequence], drafter: PagedDrafter, depths: list[int]) -> DraftSize | None:
        if not any(depths):
            return None
        drafted = [one for one, depth in zip(sequences, depths, strict=True) if depth]
        num_nodes = round(float(self._expanded_D[depths].sum()))
        return DraftSize(max(depths), num_nodes, sum(map(drafter.num_unread, drafted)))

    def learn(self, step: Plan, tree: TokenTree | None, verdict: Verdict, seconds: float) -> None:
        """What became of the step and the seconds it took in all."""
        last, self._last = self._last, None
        if last is None or not last.sequences:
            return
        self._num_unsaved += 1
        # Of steps that are to be plain whatever they take, some are enough.
        if self._payoff and self._payoff.is_resting and self._num_unsaved % self._WATCHED:
            return
        rows = last.load.num_rows + (0 if tree is None else sum(tree.shape.sizes) - tree.batch_size)
        self._see(last, rows, verdict, seconds)
        # Of a prompt's time none is saved up: steps behind it take less, and looks elsewhere are paid by those.
        saved = seconds
        if last.load.num_prompt:
            sizes = np.array([rows - last.load.num_prompt, rows], dtype=float)
            bare_s, whole_s = self.costs.step_s(sizes, last.load.num_sequences, last.load.context)
            saved = seconds * float(bare_s / whole_s)
        share, self._num_unsaved = self._explore * self._num_unsaved / len(self._KINDS), 0
        for kind in self._KINDS:
            # Saved time must not turn into a row of steps that all look elsewhere.
            self._savings[kind] = min(self._savings.get(kind, saved) + share * saved, 2 * saved)
        if last.draft is None:
            return
        self.costs.observe_draft(last.draft, last.draft_s)
        records = [self._records[one] for one in last.sequences]
        outcomes = [
            Outcome(depth, verdict.tokens[row], len(verdict.paths[row]) - 1) for row, depth in enumerate(last.depths)
        ]
        self._outlook.learn(last.scores, records, last.option, outcomes)

    def _see(self, last: _Step, rows: int, verdict: Verdict, seconds: float) -> None:
        """What the step took, and whether its drafts were worth it."""
        load = last.load
        self.costs.observe_step(TargetSize(rows, load.num_sequences, load.context), seconds - last.draft_s)
        if load.num_prompt or self._payoff is None:
            return
        # As it was calibrated: what drafts made of it since must not move what they are measured against.
        plain_s = self.costs.target.predict(load.num_rows, load.num_sequences, load.context)
        num_rows, num_tokens = len(last.sequences), sum(map(len, verdict.tokens))
        in_vain = rows == load.num_rows and last.draft is None
        if in_vain:
            self._payoff.saw_plain(num_rows, seconds - last.looked_s, plain_s)
        if not in_vain or last.looked_s > 0:
            self._payoff.saw_drafts(num_rows, num_tokens, seconds, plain_s, in_vain, self._reading_s(last))

    def _reading_s(self, last: _Step) -> float:
        """What the step's drafter took to read texts that it had not followed; the root is read for every draft."""
        if last.draft is None:
            return 0.0
        size, num_drafted = last.draft, sum(depth > 0 for depth in last.depths)
        caught_up = np.array([size.num_caught_up, num_drafted], dtype=float)
        whole_s, bare_s = self.costs.draft_s(np.full(2, size.num_levels), np.full(2, size.num_nodes), caught_up)
        return last.draft_s * float(1 - min(bare_s / whole_s, 1.0)) if whole_s > 0 else 0.0

    def _options(
        self,
        sequences: list[Sequence],
        records: list[RequestRecord],
        limits_B: Ints,
        drafter: PagedDrafter,
        ready: Scores | None,
    ) -> Options:
        gain_BDO, nodes_BDO = self._outlook.promise(records, ready)
        left = [one.max_tokens - len(one.token_ids) for one in sequences]
        return Options(
            gain_BDO,
            nodes_BDO,
            self._expanded_D,
            np.array([drafter.num_unread(one) for one in sequences], dtype=float),
            limits_B,
            1 / np.clip(left, 1, self._HORIZON),
        )

    def _look_elsewhere(self, options: Options, load: Load, choice: Choice, slept_B: Array) -> Choice:
        """Another choice, now and then, from which more is learned, as far as time has been saved for it.

        Rows that are not drafted for would never be seen to recover, depths that are not reached to pay, and plain steps to
        have become cheap.
        """
        # Whoever looked last comes last: what costs nothing could look in every step, and nobody else would.
        for kind in self._turns:
            for depths_B, option in self._elsewhere(kind, options, choice, slept_B):
                other = instead(options, load, self.costs, choice, depths_B, option)
                regret = max(choice.value - other.value, 0.0) / max(choice.rate, 1e-12)
                if regret <= self._savings.get(kind, 0.0):
                    self._savings[kind] = self._savings.get(kind, 0.0) - regret
                    self.counts.explored_s += regret
                    self._turns = [*(one for one in self._turns if one != kind), kind]
                    return other
        return choice

    def _elsewhere(self, kind: str, options: Options, choice: Choice, slept_B: Array) -> list[tuple[Ints, int]]:
        depths_B, limits_B = choice.depths_B, options.limits_B
        is_drafting, narrowest = bool(depths_B.any()), 0
        if kind == "wake":
            asleep_B = (depths_B == 0) & (limits_B > 0)
            if not asleep_B.any():
                return []
            # All of them, or else the one that has slept longest.
            longest = np.where(asleep_B, slept_B, -1.0).argmax()
            alone_B = asleep_B & (np.arange(len(asleep_B)) == longest)
            option = choice.option if is_drafting else narrowest
            return [(np.where(who_B, 1, depths_B), option) for who_B in (asleep_B, alone_B)]
        if kind == "deepen":
            deeper_B = np.where(depths_B > 0, limits_B, 0)
            return [(deeper_B, choice.option)] if (deeper_B > depths_B).any() else []
        return [(np.zeros_like(depths_B), narrowest)] if is_drafting else []

    def _draft(
        self,
        sequences: list[Sequence],
        depths: list[int],
        choice: Choice,
        load: Load,
        drafter: PagedDrafter,
        noise: Noise,
    ) -> tuple[Scores | None, TokenTree]:
        """The drafted trees as they were scored and as they are verified."""
        records, scored = [self._records[one] for one in sequences], list[Scores]()

        def keep(tree: TokenTree) -> Tensor | None:
            scores = self._outlook.score(tree, records)
            if scores is None:
                return None
            scored.append(scores)
            allowed_BN = scores.depth_BN <= choice.depths_B[:, None]
            return torch.from_numpy(keep_best(scores.probs_BN * allowed_BN, load, self.costs, choice.rate))

        policy = shallower(self._outlook.policies[choice.option], depths, keep)
        tree = drafter.propose(sequences, policy, noise)
        if not policy.was_grown and (kept := keep(tree)) is not None:
            tree = prune(tree, kept).tree
        return (scored[0] if scored else None), tree

    def _count(self, depths: list[int], scores: Scores | None, tree: TokenTree) -> None:
        nodes = sum(tree.shape.sizes) - tree.batch_size
        self.counts.num_rows += len(depths)
        has_nodes_B = np.array(depths) > 0
        self.counts.num_nodes += nodes
        if scores is not None:
            has_nodes_B = has_nodes_B | (scores.depth_BN > 0).any(1)
            self.counts.num_pruned += int((scores.depth_BN > 0).sum()) - nodes
        self.counts.num_drafted += int(has_nodes_B.sum())


def _load(step: Plan) -> Load:
    num_prompt = sum(step.chunks)
    return Load(
        num_prompt + len(step.verifying),
        len(step.sequences),
        sum(one.num_computed for one in step.sequences),
        num_prompt,
        len(step.verifying),
    )
