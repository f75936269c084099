"""Linear layers in packed layouts for the CPU: products with few rows, which are bound by reading the weight."""

from specdec.kernels.linear.api import PackedWeight, can_pack, pack, room_for
from specdec.kernels.linear.arena import Arena

__all__ = ["Arena", "PackedWeight", "can_pack", "pack", "room_for"]
