"""What steps cost here: measured once per model, drafter and machine, and remembered on disk."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Generator
from collections.abc import Sequence as Seq
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, cast

import torch
from rich.console import Console

from specdec.cost import CostModel, DraftCost, DraftSize, TargetCost, TargetSize
from specdec.drafters.found import Found
from specdec.drafters.pruning import shallower
from specdec.drafters.union import UnionDrafter
from specdec.engine import Engine
from specdec.interfaces import Drafter, Noise, PagedDrafter, TreePolicy, Verdict
from specdec.model import PagedModel
from specdec.passed import record_of, remember
from specdec.provenance import device_name
from specdec.request import Token
from specdec.sampling import SamplingParams
from specdec.scheduler import Plan
from specdec.sequence import Sequence
from specdec.tree import DrawKind, TokenTree, TreeSpec
from specdec.verifiers import Follow, Verifier

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
_SOURCES = ("attention", "cost", "decoder", "engine", "kv_cache", "model", "packing")
# What is measured, and how: whatever an earlier version has remembered is measured anew.
_VERSION = 4
_REPEATS, _WARM_UP = 3, 2
# What a busy machine is seen by, and seconds above which a step is measured once.
_STEADY, _LONG = 1.3, 0.3
_CONTEXT = 512


def calibrated_costs(
    target: PagedModel, drafter: Drafter, policy: TreePolicy, names: Seq[str], max_batch_size: int
) -> CostModel:
    """The costs of this target and drafter, as remembered or else measured now (seconds to a minute).

    What was measured while the machine had other work is used, since every step corrects it, but not remembered. `names` say
    what drafter and policy are. The drafter is bound to an engine of its own for the measurement: bind it again afterwards.
    """
    threads, device = torch.get_num_threads(), device_name(target.device)
    key = [_VERSION, str(target.dtype), target.numerics, threads, device, *names, max_batch_size]
    record = record_of(target, "costs", _SOURCES, *key)
    if (known := _remembered(record)) is not None:
        return known
    console = Console(stderr=True)
    with console.status("measuring what steps cost: once for this model, drafter and machine"):
        measured = measure_costs(target, drafter, policy, max_batch_size)
    if measured.unrest <= _STEADY:
        remember(record, target, costs=measured.costs.to_dict())
    else:
        console.print(
            f"[yellow]steps of one size took {measured.unrest:.1f} times as long as the quickest of them: the machine is "
            f"busy, so costs will be measured again next time"
        )
    return measured.costs


class Measured(NamedTuple):
    """Costs, and how many times as long as the quickest step of its size the middle one took, at the middle of all sizes."""

    costs: CostModel
    unrest: float


def measure_costs(target: PagedModel, drafter: Drafter, policy: TreePolicy, max_batch_size: int) -> Measured:
    """Runs whole steps of an engine on made-up prompts: trees of every size, drafts of several depths, one sequence and
    several, a short context and a long one. The median of each is fitted."""
    longest = target.max_positions or 1 << 20
    probe = _Probe(policy, target.vocab_size)
    batch = min(max_batch_size, 8)
    rows = [n for n in ROWS if n <= target.vocab_size]
    plans = [(1, 16, rows), (batch, 16, [batch, 4 * batch, 16 * batch]), (1, _CONTEXT, [rows[0], rows[-1]])]
    room = _Room(max(policy.max_nodes, *rows, 16), policy)
    for num_sequences, context, sizes in plans:
        probe.begin([n for n in sizes if n // num_sequences <= min(target.vocab_size, room.max_nodes)])
        length = min(context, longest // 2)
        # Two drafts at most go with a step of the target; such a step may emit one drafted token beside its own.
        tokens = 4 * (probe.num_steps + _WARM_UP) + policy.max_depth + 2
        prompts = [[(i * 31 + row) % target.vocab_size for i in range(length)] for row in range(num_sequences)]
        params = SamplingParams(max_new_tokens=tokens, ignore_eos=True, seed=0)
        engine = Engine(Verifier(target, Follow()), drafter, room, max_batch_size=num_sequences, speculation=probe)
        with closing(cast(Generator[Token, None, None], engine.stream(prompts, params))) as stream:
            for _ in stream:
                if probe.is_done:
                    break
    return Measured(probe.costs(), probe.unrest())


class _Room:
    """A policy that nothing grows by: it reserves the slots that the probe's trees need."""

    spec = TreeSpec(frozenset({DrawKind.FIXED}), is_chain=False)

    def __init__(self, max_nodes: int, policy: TreePolicy) -> None:
        self.max_nodes, self.max_depth = max_nodes, policy.max_depth
        self.max_expanded = max(max_nodes, policy.max_expanded)


class _Probe:
    """A speculation that verifies stars of every size and times drafts on the way, which it throws away."""

    def __init__(self, policy: TreePolicy, vocab_size: int) -> None:
        self._policy, self._vocab_size = policy, vocab_size
        self._target: dict[TargetSize, list[float]] = defaultdict(list)
        self._draft: dict[DraftSize, list[float]] = defaultdict(list)
        # Every depth right behind another draft, as where drafting pays, and after steps without one, when the drafter has
        # fallen behind: what catching up costs must not be taken for what any draft costs.
        most, half = policy.max_depth, (policy.max_depth + 1) // 2
        self._depths = itertools.cycle([1, 1, 0, most, most, 0, half, half, 0, 1, 1, 0, 0, 0, 0])
        self._expanded = (policy.max_expanded - 1) / max(policy.max_depth - 1, 1)

    def begin(self, sizes: Seq[int]) -> None:
        """From now on trees of these numbers of rows in all, a few times each."""
        self._sizes = [n for _ in range(_REPEATS) for n in sizes]
        self._step = -_WARM_UP
        self._spent, self._drafted_now = 0.0, False

    @property
    def num_steps(self) -> int:
        return len(self._sizes)

    @property
    def is_done(self) -> bool:
        return self._step >= self.num_steps

    def propose(self, step: Plan, drafter: PagedDrafter, policy: TreePolicy, noise: Noise) -> TokenTree:
        start = time.perf_counter()
        roots = torch.tensor([one.root for one in step.drafting])
        self._drafted_now = self._time_draft(step.drafting, drafter, noise)
        # A drafter takes accepted nodes for those of its own last tree: behind a draft the roots are verified alone.
        rows = 1 if self._drafted_now else self._sizes[max(self._step, 0) % self.num_steps]
        each = max(rows // len(roots), 1)
        stars = (roots[:, None] + torch.arange(each)) % self._vocab_size
        parents = torch.where(torch.arange(each) > 0, 0, -1).expand_as(stars)
        device = getattr(noise, "seeds_B", roots).device
        tree = TokenTree.from_parents(stars.to(device), parents.to(device), vocab_size=self._vocab_size)
        contexts = sum(one.num_computed for one in step.drafting)
        self._size = TargetSize(each * len(roots), len(roots), round(contexts, -2))
        self._spent = time.perf_counter() - start
        return tree

    def learn(self, step: Plan, tree: TokenTree | None, verdict: Verdict, seconds: float) -> None:
        if not step.drafting:
            return
        if self._step >= 0 and not self.is_done:
            self._target[self._size].append(seconds - self._spent)
            if seconds > _LONG and not self._drafted_now:
                # Of a long step one is enough: it hardly varies, and all of them would take minutes.
                behind = self._sizes[self._step + 1 :]
                rows = self._sizes[self._step]
                self._sizes[self._step + 1 :] = [other for other in behind if other != rows]
        self._step += not self._drafted_now

    def costs(self) -> CostModel:
        """The fit to the medians."""
        target = [(size, statistics.median(seconds)) for size, seconds in self._target.items()]
        draft = [(size, statistics.median(seconds)) for size, seconds in self._draft.items()]
        return CostModel(TargetCost.fit(target), DraftCost.fit(draft))

    def unrest(self) -> float:
        """See `Measured`; of what runs alone, steps of one size are within a few per cent of each other."""
        return statistics.median(statistics.median(seconds) / min(seconds) for seconds in self._target.values())

    def _time_draft(self, sequences: list[Sequence], drafter: PagedDrafter, noise: Noise) -> bool:
        depth = next(self._depths)
        if not depth:
            return False
        unread, depths = [drafter.num_unread(one) for one in sequences], [depth] * len(sequences)
        found = Found(drafter, sequences, self._policy, noise) if isinstance(drafter, UnionDrafter) else None
        # What a union has at once is there in every step, drafted or not.
        start = time.perf_counter()
        if found is not None:
            _, tree = found.drafted(depths, lambda probs_BN: probs_BN > 0)
        else:
            tree = drafter.propose(sequences, shallower(self._policy, depths), noise)
        # On an accelerator the draft is done when its size is known.
        tree.num_nodes_B.tolist()
        seconds = time.perf_counter() - start
        if self._step >= 0:
            nodes = round(len(sequences) * (1 + (depth - 1) * self._expanded))
            self._draft[DraftSize(depth, nodes, sum(unread))].append(seconds)
        return True


def _remembered(record: Path | None) -> CostModel | None:
    try:
        return None if record is None else CostModel.from_dict(json.loads(record.read_text())["costs"])
    except (OSError, KeyError, ValueError):
        return None
