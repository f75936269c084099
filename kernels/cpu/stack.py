"""A stack of decoder layers over pages in one call: norm, attention, norm, gated linear unit, as Llama has them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec.kernels.cpu.attention import described
from specdec.kernels.cpu.blocked import BlockedWeight, WeightStruct
from specdec.kernels.cpu.build import library
from specdec.kernels.tree_attention import AttentionPlan, SequencePlan

# Products read rows in pairs of tiles of 16.
_ROWS = 32


@dataclass(frozen=True)
class StackShape:
    """Sizes that all layers share. `scaling` multiplies scores, `eps` is that of the norms."""

    hidden_size: int
    num_heads: int
    num_groups: int
    head_size: int
    eps: float
    scaling: float


@dataclass(frozen=True)
class DecoderLayer:
    """Weights of a layer: queries, keys and values in one, gate and up in one; norms of the heads where it has them.

    `norm1_D` is None where what the layer reads comes from outside.

    `window` counts the positions a token sees, its own included; None: all.
    """

    norm1_D: Tensor | None
    qkv: BlockedWeight
    out: BlockedWeight
    norm2_D: Tensor
    gate_up: BlockedWeight
    down: BlockedWeight
    query_norm_E: Tensor | None = None
    key_norm_E: Tensor | None = None
    window: int | None = None


class _Layer(ctypes.Structure):
    _fields_ = (
        ("norm1", ctypes.c_void_p),
        ("qkv", WeightStruct),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("out", WeightStruct),
        ("norm2", ctypes.c_void_p),
        ("gate_up", WeightStruct),
        ("down", WeightStruct),
        ("window", ctypes.c_int64),
    )


class _Stack(ctypes.Structure):
    _fields_ = (
        ("num_layers", ctypes.c_int64),
        ("hidden_size", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_groups", ctypes.c_int64),
        ("head_size", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("scaling", ctypes.c_float),
        ("layers", ctypes.c_void_p),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("num_tokens", ctypes.c_int64),
        ("num_sequences", ctypes.c_int64),
        ("num_threads", ctypes.c_int64),
        ("sequences", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("read", ctypes.c_void_p),
        ("asked", ctypes.c_void_p),
        ("num_asked", ctypes.c_int64),
        ("num_asked_sequences", ctypes.c_int64),
        ("asked_sequences", ctypes.c_void_p),
    )


class DecoderStack:
    """Decoder layers that run in one call. Every token's bits depend on its own path alone, whatever is beside it.

    Raises ValueError for shapes that the kernels do not do.
    """

    def __init__(self, shape: StackShape, layers: Seq[DecoderLayer]) -> None:
        if shape.hidden_size % 32 or shape.head_size % 32 or shape.head_size > 256:
            raise ValueError(
                f"hidden size {shape.hidden_size} and head size {shape.head_size} must be multiples of 32, and a head at most "
                f"256 wide"
            )
        if any(layer.down.inputs % 32 for layer in layers):
            raise ValueError(f"intermediate size {layers[0].down.inputs} must be a multiple of 32")
        self.shape, self.layers = shape, tuple(layers)
        self._layers = (_Layer * len(layers))(*(_layer(layer) for layer in layers))
        self._stack = _Stack(
            len(layers),
            shape.hidden_size,
            shape.num_heads,
            shape.num_groups,
            shape.head_size,
            shape.eps,
            shape.scaling,
            ctypes.addressof(self._layers),
        )
        self._rooms: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    @property
    def address(self) -> int:
        """Where the structure lies that C++ knows the layers by."""
        return ctypes.addressof(self._stack)

    def run(
        self,
        hidden_TD: Tensor,
        positions_T: Tensor,
        plan: AttentionPlan,
        cos_PE: Tensor,
        sin_PE: Tensor,
        keys: Seq[int],
        values: Seq[int],
        wanted: Seq[int] = (),
        read_TX: Tensor | None = None,
        rows_R: Tensor | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The states [R, D] of the packed rows `rows_R` (None: all) behind the last layer, and those of all rows behind each of
        the layers `wanted`, counted from 0.

        What the last layer makes of other rows than `rows_R` is not computed, where these are the last of their sequences.
        `cos_PE` and `sin_PE` hold every position that occurs; `keys` and `values` are the addresses of each layer's cache,
        which holds the new tokens' afterwards. `read_TX`, from `padded_rows`, is what the first layer's queries, keys and
        values are made of where that is not its normed input; `hidden_TD` is then only what the layer adds to.
        """
        count, size = hidden_TD.shape
        rows_TD = padded_rows(count, size)
        rows_TD[:count] = hidden_TD
        sequences, kept = described(plan.sequences)
        chosen = None if rows_R is None or len(self.layers) - 1 in wanted else last_queries(plan.sequences, rows_R)
        ends, _kept = described([] if chosen is None else chosen.sequences)
        kept = [positions_T.contiguous(), plan.slots_T.contiguous(), *kept]
        found = {layer: hidden_TD.new_empty(count, size) for layer in wanted}
        addresses = ctypes.c_void_p * len(self.layers)
        hidden = addresses(*(found[i].data_ptr() if i in found else None for i in range(len(self.layers))))
        each_keys, each_values = addresses(*keys), addresses(*values)
        step = _Step(
            count,
            len(sequences),
            torch.get_num_threads(),
            ctypes.addressof(sequences),
            kept[0].data_ptr(),
            kept[1].data_ptr(),
            cos_PE.data_ptr(),
            sin_PE.data_ptr(),
            ctypes.addressof(each_keys),
            ctypes.addressof(each_values),
            ctypes.addressof(hidden),
            None if read_TX is None else read_TX.data_ptr(),
            # No row at all has no address, and none is read.
            None if chosen is None else chosen.rows_W.data_ptr() or kept[0].data_ptr(),
            0 if chosen is None else len(chosen.rows_W),
            len(ends),
            ctypes.addressof(ends),
        )
        normed, wide = self._room(count)
        library().specdec_run(
            self.address,
            ctypes.addressof(step),
            rows_TD.data_ptr(),
            normed.data_ptr(),
            wide.data_ptr(),
        )
        if chosen is not None:
            return rows_TD[: len(chosen.rows_W)][chosen.order_R], found
        is_all = rows_R is None or (len(rows_R) == count and rows_R.tolist() == list(range(count)))
        return (rows_TD[:count] if is_all else rows_TD[rows_R]), found

    def _room(self, count: int) -> tuple[Tensor, Tensor]:
        normed, wide = ctypes.c_int64(), ctypes.c_int64()
        library().specdec_room(self.address, count, ctypes.addressof(normed), ctypes.addressof(wide))
        if self._rooms[0].numel() < normed.value or self._rooms[1].numel() < wide.value:
            self._rooms = (
                torch.empty(normed.value, dtype=torch.bfloat16),
                torch.empty(wide.value, dtype=torch.bfloat16),
            )
        return self._rooms


@dataclass(frozen=True)
class LastQueries:
    """The ends of some sequences: their packed rows [W], ascending, the sequences cut to them, and where among the rows each
    of those asked for stands."""

    rows_W: Tensor
    sequences: list[SequencePlan]
    order_R: Tensor


def last_queries(sequences: Seq[SequencePlan], rows_R: Tensor) -> LastQueries | None:
    """None where all rows are asked for, or rows that are not the last of their sequences."""
    asked, rows = set(rows_R.tolist()), list[int]()
    ends = list[SequencePlan]()
    total = sum(one.num_queries for one in sequences)
    if len(asked) >= total or len(asked) < len(rows_R):
        return None
    for one in sequences:
        end = one.row + one.num_queries
        first = end
        while first > one.row and first - 1 in asked:
            first -= 1
        if first == end:
            continue
        if first > one.row and one.tail_mask_QM is not None:
            return None
        rows += range(first, end)
        ends.append(replace(one, row=first, num_queries=end - first, _masks={}, _tiles={}))
    if len(rows) < len(asked):
        return None
    order = {row: i for i, row in enumerate(rows)}
    at_R = [order[row] for row in rows_R.tolist()]
    # Both are empty where a prompt is only read.
    return LastQueries(torch.tensor(rows, dtype=torch.int64), ends, torch.tensor(at_R, dtype=torch.int64))


def padded_rows(count: int, size: int) -> Tensor:
    """Room for `count` rows, with memory behind them that products may read."""
    return torch.empty(-(-count // _ROWS) * _ROWS, size, dtype=torch.bfloat16)


def norm(
    hidden_TD: Tensor, rows_R: Tensor | None, weight_D: Tensor, eps: float, out_RD: Tensor | None = None
) -> Tensor:
    """Root mean square norm [R, D] of some rows (None: all), as the stack computes it; `out_RD` may be a part of wider rows."""
    hidden_TD = hidden_TD.contiguous()
    count = len(hidden_TD) if rows_R is None else len(rows_R)
    out_RD = hidden_TD.new_empty(count, hidden_TD.shape[1]) if out_RD is None else out_RD
    rows_R = None if rows_R is None else rows_R.contiguous()
    library().specdec_norm(
        hidden_TD.data_ptr(),
        0 if rows_R is None else rows_R.data_ptr(),
        count,
        weight_D.data_ptr(),
        hidden_TD.shape[1],
        eps,
        out_RD.data_ptr(),
        out_RD.stride(0),
    )
    return out_RD


def _layer(layer: DecoderLayer) -> _Layer:
    return _Layer(
        None if layer.norm1_D is None else layer.norm1_D.data_ptr(),
        layer.qkv.struct,
        None if layer.query_norm_E is None else layer.query_norm_E.data_ptr(),
        None if layer.key_norm_E is None else layer.key_norm_E.data_ptr(),
        layer.out.struct,
        layer.norm2_D.data_ptr(),
        layer.gate_up.struct,
        layer.down.struct,
        layer.window or 0,
    )
