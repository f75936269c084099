"""Linear layers and stacks of decoder layers in bfloat16, in C++ for the vectors or tiles that a CPU has."""

from specdec.kernels.cpu.attention import path_attention
from specdec.kernels.cpu.blocked import BlockedWeight
from specdec.kernels.cpu.build import NotBuilt, can_run, instruction_set, library
from specdec.kernels.cpu.growth import GrowingRoot, GrownTrees, TreeGrower
from specdec.kernels.cpu.largest import can_find_largest, largest
from specdec.kernels.cpu.stack import DecoderLayer, DecoderStack, StackShape, norm, padded_rows

__all__ = [
    "BlockedWeight",
    "DecoderLayer",
    "DecoderStack",
    "GrowingRoot",
    "GrownTrees",
    "NotBuilt",
    "StackShape",
    "TreeGrower",
    "can_find_largest",
    "can_run",
    "instruction_set",
    "largest",
    "library",
    "norm",
    "padded_rows",
    "path_attention",
]
