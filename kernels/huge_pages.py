"""Memory on huge pages: with pages of 4 KB a good part of reading weights, keys and values goes into finding the pages."""

from __future__ import annotations

import ctypes
import platform

from torch import Tensor

HUGE_PAGE = 2 * 1024 * 1024
_MADV_HUGEPAGE = 14


def on_huge_pages(tensor: Tensor) -> Tensor:
    """The same tensor, contiguous and not yet written to; on the CPU it will lie on huge pages where the system gives some."""
    if platform.system() == "Linux" and tensor.device.type == "cpu":
        begin = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        size = tensor.data_ptr() + tensor.nbytes - begin
        if size >= HUGE_PAGE:
            # A wish: where it is refused, everything works as before.
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), _MADV_HUGEPAGE)
    return tensor
