"""Tree attention over a paged KV cache."""

from specdec.kernels.tree_attention.api import AttentionPlan, SequencePlan, tree_attention

__all__ = ["AttentionPlan", "SequencePlan", "tree_attention"]
