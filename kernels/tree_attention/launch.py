"""How the Triton kernels of tree attention are launched: every tuning constant, chosen by shapes alone.

Nothing is tried out at run time, so a CUDA graph can be captured at the first call, and nothing depends on lengths that only
the device knows. The choices aim at memory bandwidth, which is what trees and single tokens wait for:

- A program loads keys and values in tiles of 32 KB together (64 slots for heads of 128 numbers of 16 bits) and has two of them
  under way. Two programs fit an SM of an H200 (228 KB of shared memory, of which one takes 70 to 100), so about 130 KB are
  in flight per SM; covering the latency of its memory takes about 30 KB.
- A program's rows are nodes x heads of one kv head, as many as the largest sequence has, at most 128 (64 where heads are
  longer than 128, for the registers). Up to 64 rows, tensor cores and exponentials still keep up with the memory.
- The context is split so that about four programs per SM exist, but a split keeps so many keys, eight for each row, that
  writing and reading its partial results (32 bits) takes a quarter of the bytes that it reads, and most of that from the cache.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

MAX_HEAD_SIZE = 256
# Slots per tile, at most; also the tail keys of a mask word, of which a tile must be a part or the whole.
MAX_TILE = 64
# Positions per split of the invariant kernels; fixed, since the order of sums hangs on it.
INVARIANT_SPLIT = 512
_TILE_BYTES = 32 * 1024
_PROGRAMS_PER_SM = 4
_MIN_SPLIT_KEYS = 256
_SPLIT_KEYS_PER_ROW = 8
_MAX_SPLITS = 64


@dataclass(frozen=True)
class Launch:
    """Rows and keys of a tile, pieces that the context is split in, warps of a program, and tiles that are loaded ahead."""

    block_rows: int
    tile: int
    num_splits: int
    num_warps: int
    num_stages: int


def pad_size(size: int) -> int:
    """The next power of two, at least the 16 that tensor cores take."""
    return max(16, 1 << (size - 1).bit_length())


def choose_launch(
    num_rows: int,
    num_sequences: int,
    num_groups: int,
    heads_per_group: int,
    max_queries: int,
    max_keys: int,
    key_size: int,
    value_size: int,
    element_size: int,
    num_sms: int,
) -> Launch:
    """For kernels that may sum in any order; `num_rows` are packed tokens, sizes are numbers but `element_size`, in bytes."""
    block_rows = min(pad_size(max_queries * heads_per_group), _most_rows(key_size, value_size, element_size))
    programs = num_row_blocks(num_rows, num_sequences, heads_per_group, block_rows) * num_groups
    # Lengths below one power of two share a launch.
    keys = 1 << (max_keys - 1).bit_length()
    most_splits = max(1, min(_MAX_SPLITS, keys // max(_MIN_SPLIT_KEYS, _SPLIT_KEYS_PER_ROW * block_rows)))
    num_splits = min(most_splits, -(-_PROGRAMS_PER_SM * num_sms // programs))
    tile = _tile(key_size, value_size, element_size)
    return Launch(block_rows, tile, num_splits, 8 if block_rows == 128 else 4, _num_stages(block_rows))


def choose_invariant_launch(max_keys: int, key_size: int, value_size: int, element_size: int) -> Launch:
    """For kernels whose sums must not depend on the batch: all but the number of splits is the head's shape's."""
    block_rows = min(64, _most_rows(key_size, value_size, element_size))
    tile = _tile(key_size, value_size, element_size)
    keys = 1 << (max_keys - 1).bit_length()
    return Launch(block_rows, tile, -(-keys // INVARIANT_SPLIT), 4, _num_stages(block_rows))


def _most_rows(key_size: int, value_size: int, element_size: int) -> int:
    # Products in float32 have no tensor cores; their operands take registers.
    return 16 if element_size == 4 else 64 if max(key_size, value_size) > 128 else 128


def _tile(key_size: int, value_size: int, element_size: int) -> int:
    slot_bytes = (pad_size(key_size) + pad_size(value_size)) * element_size
    return min(MAX_TILE, _TILE_BYTES // slot_bytes)


def _num_stages(block_rows: int) -> int:
    # Slots are loaded before the keys that they name, so loading ahead by one tile takes two stages. Blocks of 64 rows run
    # on the asynchronous tensor cores, which hold one tile more. Either way two tiles are under way.
    return 3 if block_rows >= 64 else 5


def num_row_blocks(num_rows: int, num_sequences: int, heads_per_group: int, block_rows: int) -> int:
    """Blocks that suffice for any way in which the rows belong to the sequences; `locate_block` says which is whose."""
    return num_rows * heads_per_group // block_rows + num_sequences


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a GPU; where kernels are interpreted, as many as give small tests several splits."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
