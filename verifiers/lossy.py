"""What the rules that are not lossless have in common: the longest path whose every token passes a test."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.interfaces import Acceptance, Noise, TargetLaws
from specdec.noise import RoundKey
from specdec.tree import TokenTree
from specdec.verifiers.walk import path_to


def longest_passing(tree: TokenTree, laws: TargetLaws, noise: Noise, cut_BN: Tensor) -> Acceptance:
    """Accepts the longest path whose tokens each have at least the probability `cut_BN` of their parent's node.

    Of equally long paths the likeliest is taken, as in Medusa's code. The next token is drawn from the law behind it.
    """
    target_BNV = laws.all()
    rows = torch.arange(tree.batch_size, device=tree.device)
    parents_BN = tree.parents_BN.clamp_min(0)
    prob_BN = target_BNV.gather(1, parents_BN[..., None].expand_as(target_BNV)).gather(2, tree.tokens_BN[..., None])[
        ..., 0
    ]
    is_root_BN = torch.arange(tree.max_nodes, device=tree.device) == 0
    # A token that the target cannot emit does not pass, however low the cut.
    passes_BN = is_root_BN | ((prob_BN >= cut_BN.gather(1, parents_BN)) & (prob_BN > 0))
    ancestors = tree.ancestors_BNN
    passes_BN = tree.is_node_BN & ~(ancestors & ~passes_BN[:, None]).any(2)
    log_prob_BN = torch.where(is_root_BN | ~passes_BN, 0, prob_BN.clamp_min(torch.finfo(prob_BN.dtype).tiny).log())
    path_BN = (ancestors * log_prob_BN[:, None]).sum(2)
    depth_BN = torch.where(passes_BN, tree.depth_BN, -1)
    deepest_BN = depth_BN == depth_BN.amax(1, keepdim=True)
    node_B = path_BN.masked_fill(~deepest_BN, -torch.inf).argmax(1)
    return path_to(tree, node_B, noise.categorical(target_BNV[rows, node_B], RoundKey("residual", 0), rows))
