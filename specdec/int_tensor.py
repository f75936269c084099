"""Tensors of integers from the host's lists, of which a step makes many."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor


def int_tensor(values: Seq[int] | Seq[Seq[int]], device: torch.device | str = "cpu") -> Tensor:
    """An int64 tensor of the values; by way of numpy in a tenth of the time of `torch.tensor`."""
    return torch.from_numpy(np.array(values, dtype=np.int64)).to(device)
