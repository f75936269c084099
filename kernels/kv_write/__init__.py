"""Writing new keys and values to their slots."""

from specdec.kernels.kv_write.api import kv_write

__all__ = ["kv_write"]
