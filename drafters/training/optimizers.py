"""Who moves the weights: AdamW, and Muon for the matrices where it is wanted."""

from __future__ import annotations

import torch

from specdec.drafters.training.objectives import Objective
from specdec.drafters.training.params import TrainingParams


def make_optimizers(objective: Objective, params: TrainingParams) -> list[torch.optim.Optimizer]:
    """AdamW for every trained parameter; with `matrix_rate` Muon for the head's matrices (Jordan et al. 2024, "Muon"), updates
    scaled to the size of AdamW's (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2), AdamW for the rest."""
    groups = objective.parameter_groups(params.learning_rate)
    matrices = [] if params.matrix_rate is None else objective.matrices()
    taken = {id(one) for one in matrices}
    for group in groups:
        group["params"] = [one for one in group["params"] if id(one) not in taken]
    groups = [group for group in groups if group["params"]]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        optimizers.append(torch.optim.AdamW(groups, betas=params.betas, weight_decay=params.weight_decay, fused=True))
    if matrices:
        assert params.matrix_rate is not None
        optimizers.append(
            torch.optim.Muon(
                matrices, params.matrix_rate, params.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            )
        )
    return optimizers
