"""Every kernel against its eager reference, on the device at hand: the first part of `gpu_check`."""

from __future__ import annotations

import importlib
import pkgutil
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import specdec.kernels
from specdec.experiments.gpu_sampling import check_acceptance, check_sampling
from specdec.experiments.kernel_check import DTYPES, FLOOR, MULTIPLE, Check, Sizes, error, kind_of, named
from specdec.kernels.tree_attention import AttentionPlan, SequencePlan, tree_attention
from specdec.kernels.tree_attention.reference import tree_attention_reference
from specdec.model import Segment, plan_attention
from specdec.pages import PagePool, PageTable
from specdec.tree import TokenTree

# What the library means to have; one that is missing is said to be, and its eager reference serves.
OPS = ("tree_attention", "kv_write", "path_commit", "sampling", "acceptance")
# Kernels of the CPU, which are proved when a model is loaded.
NO_DEVICE = ("cpu", "linear")


def check_kernels(device: torch.device, sizes: Sizes) -> list[Check]:
    """A check or more per op of `specdec.kernels`, and one for each of `OPS` that there is not."""
    found = {one.name for one in pkgutil.iter_modules(specdec.kernels.__path__) if one.ispkg}
    checks: list[Check] = []
    for op in (*OPS, *sorted(found - {*OPS})):
        if op not in found:
            checks.append(Check(op, None, "missing: there is no such kernel"))
        elif op in NO_DEVICE:
            continue
        elif op not in CHECKS:
            checks.append(Check(op, None, "there is a kernel, but no check of it here"))
        else:
            checks += CHECKS[op](device, sizes)
    return checks


def _attention(device: torch.device, sizes: Sizes) -> list[Check]:
    checks = []
    options: list[dict[str, Any]] = [{}, {"window": 17}, {"softcap": 5.0}, {"sinks_H": True}]
    for dtype in DTYPES:
        worst, eager, kind, passed = 0.0, 0.0, "eager", True
        for heads, groups, size in sizes.heads:
            for option in options:
                case = _Case(heads, groups, size, dtype, device, sizes)
                chosen = {**option, "sinks_H": case.sinks_H} if "sinks_H" in option else option
                arguments = case.query_THE, case.keys_SGE, case.values_SGE
                found = tree_attention(*arguments, case.plan, scaling=size**-0.5, **chosen)
                own = case.reference(dtype, size, chosen)
                truth = case.reference(torch.float64, size, chosen)
                one, other = error(found, truth), error(own, truth)
                worst, eager, passed = max(worst, one), max(eager, other), passed and one <= MULTIPLE * other + FLOOR
                kind = kind_of(case.query_THE)
        detail = f"{kind}: error {worst:.1e}, of the eager reference {eager:.1e}"
        checks.append(Check(f"tree_attention {named(dtype)}", passed, detail))
    return [*checks, *(_invariant(dtype, device, sizes) for dtype in DTYPES)]


def _invariant(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> Check:
    """Nodes of a tree, and each of them alone behind its path: the same bits."""
    name, (heads, groups, size) = f"invariant attention {named(dtype)}", sizes.heads[0]
    case = _Case(heads, groups, size, dtype, device, sizes, num_sequences=1)
    options: dict[str, Any] = {"scaling": size**-0.5, "is_invariant": True}
    try:
        together = tree_attention(case.query_THE, case.keys_SGE, case.values_SGE, case.plan, **options)
    except ValueError as error:
        return Check(name, None, str(error))
    part = case.plan.sequences[0]
    slots, differing = _slots(part), 0
    for node in range(part.num_queries):
        path = part.visible_len + case.trees[0].ancestors_BNN[0, node].nonzero().flatten()
        own = torch.cat([slots[: part.visible_len], slots[path]])
        last = torch.tensor([len(own) - 1], device=device)
        alone = SequencePlan(0, 1, len(own) - 1, None, last, None, own)
        plan = AttentionPlan(own[-1:], None, [alone])
        found = tree_attention(case.query_THE[node : node + 1], case.keys_SGE, case.values_SGE, plan, **options)
        differing += not torch.equal(found[0], together[node])
    detail = f"{differing} of {part.num_queries} nodes get other bits than alone"
    return Check(name, differing == 0, detail)


def _kv_write(device: torch.device, sizes: Sizes) -> list[Check]:
    return [_written(dtype, device, sizes) for dtype in DTYPES]


def _written(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> Check:
    op, reference = _op("kv_write")
    _, groups, size = sizes.heads[0]
    count, slots = sizes.nodes + 3, sizes.context
    generator = torch.Generator().manual_seed(1)
    caches = [torch.randn(slots, groups, n, generator=generator).to(device, dtype) for n in (size, size)]
    # Heads first, as attention hands them over.
    new = [torch.randn(groups, count, size, generator=generator).to(device).transpose(0, 1) for _ in caches]
    at = torch.randperm(slots, generator=generator)[:count].to(device)
    results = []
    for write in (op, reference):
        copies = [one.clone() for one in caches]
        write(*copies, at, None, *new)
        results.append(copies)
    return _equal(f"kv_write {named(dtype)}", results)


def _path_commit(device: torch.device, sizes: Sizes) -> list[Check]:
    return [_moved(dtype, device, sizes) for dtype in DTYPES]


def _moved(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> Check:
    op, reference = _op("path_commit")
    _, groups, size = sizes.heads[0]
    generator = torch.Generator().manual_seed(2)
    caches = [torch.randn(3, sizes.context, groups, size, generator=generator).to(device, dtype) for _ in range(2)]
    # Rows in slots of their own, moved down as paths are: some slots are source and target.
    span, rows = sizes.nodes, max(sizes.context // sizes.nodes - 1, 1)
    sources = torch.full((rows, span // 2), -1)
    targets = sources.clone()
    for row in range(rows):
        path = sorted(torch.randperm(span, generator=generator)[: span // 2].tolist())
        sources[row], targets[row] = row * span + torch.tensor(path), row * span + torch.arange(len(path))
    results = []
    for commit in (op, reference):
        copies = [one.clone() for one in caches]
        commit(copies, sources.to(device), targets.to(device))
        results.append(copies)
    return _equal(f"path_commit {named(dtype)}", results)


CHECKS: dict[str, Callable[[torch.device, Sizes], list[Check]]] = {
    "tree_attention": _attention,
    "kv_write": _kv_write,
    "path_commit": _path_commit,
    "sampling": check_sampling,
    "acceptance": check_acceptance,
}


def _op(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """An op, which chooses its kernel, and its reference."""
    reference = importlib.import_module(f"specdec.kernels.{name}.reference")
    return getattr(importlib.import_module(f"specdec.kernels.{name}"), name), getattr(reference, f"{name}_reference")


def _equal(name: str, results: list[list[Tensor]]) -> Check:
    kind = kind_of(results[0][0])
    same = all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    return Check(name, same, f"{kind}: {'the same bits as' if same else 'other bits than'} the eager reference")


def _slots(part: SequencePlan) -> Tensor:
    if part.slots is not None:
        return part.slots
    assert part.first_slot is not None
    return torch.arange(part.first_slot, part.first_slot + part.num_keys, device=part.tail_positions_M.device)


class _Case:
    """Random trees, a chunk and a single token over scattered pages; slots that nobody holds are NaN."""

    def __init__(
        self,
        heads: int,
        groups: int,
        size: int,
        dtype: torch.dtype,
        device: torch.device,
        sizes: Sizes,
        num_sequences: int = 4,
    ) -> None:
        draw, generator = random.Random(0), torch.Generator().manual_seed(0)
        lengths = [(sizes.nodes, sizes.context), (1, sizes.context // 2), (sizes.nodes // 2, 3), (sizes.nodes // 3, 0)]
        pool = PagePool(4 * ((sizes.context + sizes.nodes) // 16 + 2), page_size=16)
        tables = [PageTable(pool) for _ in lengths]
        # Turn by turn, so that nobody's pages lie in a row.
        for part in (3, 2, 1):
            for table, (nodes, context) in zip(tables, lengths, strict=True):
                table.reserve((context + nodes) // part, 0)
        self.trees, segments = [], []
        for table, (nodes, context) in list(zip(tables, lengths, strict=True))[:num_sequences]:
            parents = [-1, *(draw.randrange(node) for node in range(1, nodes))]
            tokens = torch.arange(nodes, device=device)
            tree = TokenTree.from_parents(tokens[None], torch.tensor([parents], device=device))
            positions = context + (tree.depth_BN[0] if nodes % 2 == 0 else tokens)
            mask = tree.ancestors_BNN[0] if nodes % 2 == 0 else None
            segments.append(Segment(table, context, tokens, positions, mask))
            self.trees.append(tree)
        self.plan = plan_attention(segments, device)
        slots = pool.num_pages * pool.page_size
        used = torch.cat([_slots(part).cpu() for part in self.plan.sequences])
        rows = sum(len(one.token_ids_Q) for one in segments)

        def cache() -> Tensor:
            states = torch.full((slots, groups, size), torch.nan)
            states[used] = torch.randn(len(used), groups, size, generator=generator)
            return states.to(device, dtype)

        self.keys_SGE, self.values_SGE = cache(), cache()
        self.query_THE = torch.randn(rows, heads, size, generator=generator).to(device, dtype)
        self.sinks_H = torch.randn(heads, generator=generator).to(device, dtype)

    def reference(self, dtype: torch.dtype, size: int, options: dict[str, Any]) -> Tensor:
        sinks: Tensor | None = options.get("sinks_H")
        return tree_attention_reference(
            self.query_THE.to(dtype),
            self.keys_SGE.to(dtype),
            self.values_SGE.to(dtype),
            self.plan.sequences,
            size**-0.5,
            options.get("window"),
            options.get("softcap"),
            None if sinks is None else sinks.to(dtype),
        )
