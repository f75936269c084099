"""The verdicts of rules that have a kernel: from logits to accepted path without the host waiting for the device.

Each function says None where the kernels do not serve the tensors, or where laws or noise are not the library's own: an
oracle's choices, say, are made one by one by the rule itself. Kernel and rule agree but for the rounding of sums.
"""

from __future__ import annotations

from torch import Tensor

from specdec.interfaces import Acceptance, Noise, TargetLaws
from specdec.kernels import acceptance
from specdec.kernels.acceptance import AcceptedPath, Coins, SampledTrees
from specdec.kernels.sampling import RowKeys
from specdec.noise import PURPOSES, CounterNoise, GumbelKey, PositionKey
from specdec.sampling import ModelLaws
from specdec.tree import TokenTree


def follow(tree: TokenTree, laws: TargetLaws, noise: Noise, is_gumbel: bool = False) -> Acceptance | None:
    """The target's token at every node, drawn at once, and the way down that they lead."""
    if not isinstance(laws, ModelLaws) or not isinstance(noise, CounterNoise) or not laws.on_device:
        return None

    def keys(rows_T: Tensor, depths_T: Tensor) -> RowKeys:
        return noise.keys(GumbelKey(depths_T) if is_gumbel else PositionKey(depths_T), rows_T)

    return _verdict(acceptance.follow(tree.tokens_BN, tree.parents_BN, laws.drawn(keys), laws.first_B))


def rejection(tree: TokenTree, laws: TargetLaws, noise: Noise) -> Acceptance | None:
    if not isinstance(laws, ModelLaws) or not isinstance(noise, CounterNoise) or not laws.on_device:
        return None
    return _verdict(acceptance.rejection(sampled(tree), laws.packed(), laws.first_B, coins(noise)))


def traversal(tree: TokenTree, laws: TargetLaws, noise: Noise) -> Acceptance | None:
    if not isinstance(laws, ModelLaws) or not isinstance(noise, CounterNoise) or not laws.on_device:
        return None
    return _verdict(acceptance.traversal(sampled(tree), laws.packed(), laws.first_B, coins(noise)))


def sampled(tree: TokenTree) -> SampledTrees:
    return SampledTrees(
        tree.tokens_BN, tree.parents_BN, tree.num_nodes_B, tree.draws_BM, tree.kinds_BM, tree.draft_laws_BNV
    )


def coins(noise: CounterNoise) -> Coins:
    return Coins(noise.seeds_B, noise.rounds_B, PURPOSES["accept"], PURPOSES["residual"])


def _verdict(path: AcceptedPath) -> Acceptance:
    return Acceptance(path.path_BN, path.num_accepted_B, path.next_token_B)
