"""The verifier: prompt chunks and trees of many sequences through one forward of the target, then the rule's verdict."""

from __future__ import annotations

import itertools
import time

import torch

from specdec.int_tensor import fetched, int_tensor
from specdec.interfaces import Acceptance, AcceptanceRule, Noise, Verdict
from specdec.kv_cache import KVCache
from specdec.metrics import StepTimes
from specdec.model import PagedModel, Segment
from specdec.pages import PagePool
from specdec.sampling import ModelLaws, token_logprobs
from specdec.scheduler import Plan
from specdec.sequence import Sequence, batch_sampling
from specdec.states import PickedStates
from specdec.tree import TokenTree, TreeSpec
from specdec.verifiers.follow import Follow


class Verifier:
    """Checks trees against a target under an acceptance rule (default: `follow`).

    Raises ValueError for a lossy rule unless `allow_lossy`, and for a target whose weights were rounded to 8 bits.
    """

    def __init__(self, target: PagedModel, rule: AcceptanceRule | None = None, allow_lossy: bool = False) -> None:
        # Targets of one's own need not know of it.
        if getattr(target, "is_rounded", False):
            raise ValueError(f"target {target.name} was loaded with int8=True, which is for draft models: leave it out")
        self.target, self.rule = target, rule if rule is not None else Follow()
        if not self.rule.lossless and not allow_lossy:
            raise ValueError(
                f"rule {self.rule.name} is LOSSY: its output does not follow the target's law; set allow_lossy=true to use it"
            )

    def require(self, spec: TreeSpec) -> None:
        """Raises ValueError where the rule would not be exact for such trees."""
        if reason := self.rule.accepts(spec):
            raise ValueError(f"rule {self.rule.name} is not exact for this policy: {reason}")

    def new_cache(self, pool: PagePool) -> KVCache:
        return self.target.new_cache(pool)

    def verify(
        self,
        plan: Plan,
        tree: TokenTree | None,
        noise: Noise,
        cache: KVCache,
        feature_layers: tuple[int, ...],
        times: StepTimes,
    ) -> Verdict:
        """One forward over the plan's chunks and the trees of `plan.verifying`; accepted keys and values end up at their
        positions. `tree` is None where every prompt goes on."""
        start = time.perf_counter()
        segments, wanted, row = [], [], 0
        place = {one.id: i for i, one in enumerate(plan.verifying)}
        counts = [] if tree is None else tree.shape.sizes
        root_rows: dict[int, int] = {}
        for one, chunk in zip(plan.sequences, plan.chunks, strict=True):
            tree_row = place.get(one.id)
            count = 0 if tree_row is None else counts[tree_row]
            segments.append(_segment(one, chunk, tree, tree_row, count, self.target.device))
            if tree_row is not None:
                root_rows[one.id] = row + chunk
            row += chunk + count
        if tree is not None:
            wanted = [
                root_rows[one.id] + n for one, count in zip(plan.verifying, counts, strict=True) for n in range(count)
            ]
            # What the device is told comes before the forward: it need not wait for it behind.
            sampling = batch_sampling(plan.verifying, self.target.vocab_size, self.target.device)
            if tree.device.type != "cpu":
                _ = tree.depth_BN
        prepared = time.perf_counter()
        rows = int_tensor(wanted, self.target.device)
        result = self.target.forward(segments, cache, rows, feature_layers)
        done = time.perf_counter()
        times.other_s += prepared - start
        times.forward_s += done - prepared
        verdict = Verdict([], [], [])
        if tree is not None:
            acceptance = self.rule(tree, ModelLaws(result.logits_RV, tree, sampling), noise)
            verdict = self._commit(plan.verifying, tree, acceptance, result.logits_RV, cache)
        if feature_layers:
            begin = 0
            for one, chunk, segment in zip(plan.sequences, plan.chunks, segments, strict=True):
                path = verdict.paths[place[one.id]] if one.id in place else []
                verdict.hidden[one.id] = PickedStates(result.hidden, _kept(begin, chunk, path))
                begin += len(segment.token_ids_Q)
        times.accept_s += time.perf_counter() - done
        return verdict

    def _commit(
        self,
        sequences: list[Sequence],
        tree: TokenTree,
        acceptance: Acceptance,
        logits_RV: torch.Tensor,
        cache: KVCache,
    ) -> Verdict:
        accepted, extra, drafted, every = _on_host(tree, acceptance)
        first = [0, *itertools.accumulate(tree.shape.sizes[:-1])]
        paths = [row[: count + 1] for row, count in zip(every, accepted, strict=True)]
        tokens = [[row[n] for n in path[1:]] + [t] for row, path, t in zip(drafted, paths, extra, strict=True)]
        source, target = [], []
        for one, path in zip(sequences, paths, strict=True):
            for depth, node in enumerate(path):
                if node != depth:
                    source.append(one.table.slot(one.root_position + node))
                    target.append(one.table.slot(one.root_position + depth))
        cache.move(source, target)
        logprobs: list[list[tuple[float, dict[int, float]]] | None] = []
        for one, path, new, at in zip(sequences, paths, tokens, first, strict=True):
            top = one.params.logprobs
            logprobs.append(None if top is None else token_logprobs(logits_RV[[at + n for n in path]], new, top))
        return Verdict(paths, tokens, logprobs)


def _on_host(tree: TokenTree, acceptance: Acceptance) -> tuple[list[int], list[int], list[list[int]], list[list[int]]]:
    """Per row: how many drafted tokens were accepted, the extra token, the nodes' tokens, the padded path."""
    columns = [acceptance.num_accepted_B, acceptance.next_token_B, acceptance.path_BK]
    if tree.device.type != "cpu":
        # One transfer, the only one of a step that the host waits for if it knew the trees.
        columns = fetched(columns if tree.is_known else [*columns, tree.tokens_BN])
    if tree.is_known:
        columns.append(tree.on_cpu.tokens_BN)
    else:
        tree.check_tokens(columns[-1])
    accepted, extra, path, tokens = (one.tolist() for one in columns)
    return accepted, extra, tokens, path


def _kept(begin: int, chunk: int, path: list[int]) -> slice | list[int]:
    """The packed rows of a chunk that begins at `begin`, and of the path in the tree behind it."""
    if path == list(range(len(path))):
        return slice(begin, begin + chunk + len(path))
    return [*range(begin, begin + chunk), *(begin + chunk + n for n in path)]


def _segment(
    one: Sequence, chunk: int, tree: TokenTree | None, row: int | None, count: int, device: torch.device
) -> Segment:
    """A sequence's prompt chunk followed by the `count` nodes of its tree, if it has one in this step."""
    start = one.num_computed
    if tree is None or row is None or count == 1:
        # A root is the last of the final tokens.
        end = start + chunk + count
        tokens = int_tensor(one.token_ids[start:end], device)
        return Segment(one.table, start, tokens, torch.arange(start, end, device=device))
    # The tree sees the chunk before it, and within itself only ancestors.
    assert chunk == 0, "trees of drafted nodes grow only where the prompt is computed"
    return Segment(
        one.table,
        start,
        tree.tokens_BN[row, :count],
        start + tree.depth_BN[row, :count],
        tree.ancestors_BNN[row, :count, :count],
    )
