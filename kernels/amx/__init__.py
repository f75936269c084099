"""Linear layers and stacks of decoder layers in C++, for CPUs with AMX."""

from specdec.kernels.amx.build import NotBuilt, can_run, library
from specdec.kernels.amx.stack import DecoderLayer, DecoderStack, StackShape, norm, padded_rows
from specdec.kernels.amx.weight import AmxWeight

__all__ = [
    "AmxWeight",
    "DecoderLayer",
    "DecoderStack",
    "NotBuilt",
    "StackShape",
    "can_run",
    "library",
    "norm",
    "padded_rows",
]
