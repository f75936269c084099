"""Acceptance rules down whole batches of trees, without a look from the host."""

from specdec.kernels.acceptance.api import follow, rejection, traversal
from specdec.kernels.acceptance.trees import AcceptedPath, Coins, SampledTrees

__all__ = ["AcceptedPath", "Coins", "SampledTrees", "follow", "rejection", "traversal"]
