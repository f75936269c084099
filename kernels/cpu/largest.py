"""The largest logit of each row, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.cpu.build import can_run, library


def can_find_largest(logits_TV: Tensor) -> bool:
    """Whether `largest` takes these logits."""
    return logits_TV.dtype == torch.bfloat16 and logits_TV.device.type == "cpu" and can_run()


def largest(logits_TV: Tensor, rows_R: Tensor | None = None) -> Tensor:
    """The token [R] of the largest logit in some rows (None: in each), the first of equal ones, as `argmax` finds it in many
    times the time."""
    logits_TV = logits_TV.contiguous()
    count = len(logits_TV) if rows_R is None else len(rows_R)
    out_R = torch.empty(count, dtype=torch.int64)
    library().specdec_largest(
        logits_TV.data_ptr(),
        0 if rows_R is None else rows_R.data_ptr(),
        count,
        logits_TV.shape[1],
        out_R.data_ptr(),
        torch.get_num_threads(),
    )
    return out_R
