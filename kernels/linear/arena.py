"""One piece of memory for all weights of a model, on huge pages where the system gives them."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.huge_pages import HUGE_PAGE, on_huge_pages


class Arena:
    """Hands out tensors of bfloat16 that lie behind one another; `num_numbers` fit.

    Memory is taken as it is written. Reading the weights is most of a step, and with pages of 4 KB a tenth of that time goes
    into finding the pages.
    """

    def __init__(self, num_numbers: int) -> None:
        room = torch.empty(num_numbers + HUGE_PAGE // 2, dtype=torch.bfloat16)
        start = -room.data_ptr() % HUGE_PAGE // 2
        self._free_X = on_huge_pages(room[start : start + num_numbers])

    def take(self, num_numbers: int) -> Tensor:
        """The next `num_numbers`, from an address that is a multiple of 64 bytes where all sizes are. Raises ValueError."""
        if num_numbers > len(self._free_X):
            raise ValueError(f"{num_numbers} numbers do not fit the {len(self._free_X)} that are left")
        taken, self._free_X = self._free_X[:num_numbers], self._free_X[num_numbers:]
        return taken
