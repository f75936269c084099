"""Timers of single parts of a step: the target's forward of a tree, its linear layers alone, and a draft of so many levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from specdec.drafters.pruning import shallower
from specdec.engine import Engine
from specdec.experiments.gpu_measures import forward_runs, in_turns
from specdec.model import PagedModel
from specdec.noise import CounterNoise
from specdec.packing import PackedLinear
from specdec.sampling import SamplingParams


def forward_costs(
    target: PagedModel, context: int, counts: Sequence[int], repeats: int, cuda_graphs: bool
) -> list[dict[str, Any]]:
    """For trees of `counts` nodes behind `context` tokens: `seconds` of the forward, `linear_s` of its linear layers alone
    (attention, norms and whatever else there is take the rest), and the bytes of their weights. All in turns, medians."""
    layers = linear_layers(target.model)
    with forward_runs(target, 1, counts, context, cuda_graphs) as runs:
        products = [
            _all_products(layers, torch.zeros(count, 1, dtype=target.dtype, device=target.device)) for count in counts
        ]
        seconds = in_turns([*runs, *products], target.device, repeats)
    num_bytes = sum(size for _, _, size in layers)
    return [
        {"num_nodes": count, "seconds": whole, "linear_s": linear, "weight_bytes": num_bytes}
        for count, whole, linear in zip(counts, seconds[: len(counts)], seconds[len(counts) :], strict=True)
    ]


def draft_seconds(engine: Engine, context: int, repeats: int) -> list[float]:
    """Seconds of a draft of 1, 2, ... levels behind about `context` tokens, the last of them read too; medians, in turns."""
    drafter, policy = engine.drafter, engine.policy
    assert drafter is not None and policy is not None
    vocab, device = engine.target.vocab_size, engine.target.device
    prompt = [(i * 31 + 3) % vocab for i in range(context)]
    handle = engine.submit(prompt, SamplingParams(max_new_tokens=64, ignore_eos=True, seed=0))
    one = handle.request.sequence
    try:
        while one.round < 2:
            engine.step()
        noise = CounterNoise([one.seed], [one.round], [one.root_position], device)

        def run(depth: int) -> Callable[[], object]:
            # On an accelerator the draft is done when its size is known.
            return lambda: drafter.propose([one], shallower(policy, [depth]), noise).num_nodes_B.tolist()

        depths = range(1, min(policy.max_depth, one.max_draft_depth) + 1)
        return in_turns([run(depth) for depth in depths], device, repeats)
    finally:
        handle.cancel()


Layer = tuple[Callable[[Tensor], Tensor], int, int]


def linear_layers(model: nn.Module) -> list[Layer]:
    """Each product with a weight once: how to run it, its inputs, and its bytes."""
    found: list[Layer] = []
    known: set[int] = set()
    for module in model.modules():
        if isinstance(module, PackedLinear):
            product = module.product
            if id(product) not in known:
                known.add(id(product))
                # Packed targets are bfloat16.
                found.append(
                    (product.weight.multiply, product.in_features, 2 * sum(product.sizes) * product.in_features)
                )
        elif isinstance(module, nn.Linear):
            weight = module.weight
            found.append((module, module.in_features, weight.numel() * weight.element_size()))
    return found


def _all_products(layers: Sequence[Layer], rows_N1: Tensor) -> Callable[[], object]:
    """Every layer once, for as many rows as `rows_N1` has."""
    inputs = {size: rows_N1.expand(-1, size).contiguous().normal_() for _, size, _ in layers}

    @torch.inference_mode()
    def run() -> None:
        for multiply, size, _ in layers:
            multiply(inputs[size])

    return run
