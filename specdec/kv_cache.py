"""The tensors behind the pages: keys and values of every layer, indexed by slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdec.int_tensor import int_tensor
from specdec.kernels.huge_pages import on_huge_pages
from specdec.kernels.kv_write import kv_write
from specdec.kernels.path_commit import path_commit
from specdec.pages import PagePool, PageTable

if TYPE_CHECKING:
    from specdec.graphs import ForwardGraphs


@dataclass(frozen=True)
class LayerShape:
    """K/V heads and their sizes in one attention layer."""

    num_kv_heads: int
    key_size: int
    value_size: int


class KVCache:
    """Keys and values of all layers on a pool's pages; layers of one shape share a tensor, so a commit is one move.

    Slots are those of `PagePool`: growing the pool grows the tensors and keeps their contents. One more lies behind them,
    `scratch_slot`, which rows of padding write to and nobody reads. `graphs` are forwards recorded over these tensors.
    """

    graphs: ForwardGraphs | None = None

    def __init__(
        self, pool: PagePool, shapes: list[LayerShape], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.pool, self.shapes, self.dtype, self.device = pool, shapes, dtype, torch.device(device)
        self.scratch_slot = 0
        distinct = list(dict.fromkeys(shapes))
        self._group = [distinct.index(shape) for shape in shapes]
        self._index = [self._group[:layer].count(self._group[layer]) for layer in range(len(shapes))]
        sizes = [self._group.count(group) for group in range(len(distinct))]
        self._keys_LSGE = [self._empty(n, s.num_kv_heads, s.key_size) for n, s in zip(sizes, distinct, strict=True)]
        self._values_LSGE = [self._empty(n, s.num_kv_heads, s.value_size) for n, s in zip(sizes, distinct, strict=True)]
        self._addresses: tuple[list[int], list[int]] | None = None
        pool.attach(self)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys [S, G, E_k] and values [S, G, E_v] of one layer over all slots; views, written in place."""
        group, at, slots = self._group[index], self._index[index], self.scratch_slot
        return self._keys_LSGE[group][at, :slots], self._values_LSGE[group][at, :slots]

    def addresses(self) -> tuple[list[int], list[int]]:
        """Where the keys and values of each layer lie in memory; another place after the pool has grown."""
        if self._addresses is None:
            layers = [self.layer(i) for i in range(len(self.shapes))]
            self._addresses = [keys.data_ptr() for keys, _ in layers], [values.data_ptr() for _, values in layers]
        return self._addresses

    def write(self, layer: int, slots_T: Tensor, first_slot: int | None, keys_TGE: Tensor, values_TGE: Tensor) -> None:
        """Stores new tokens at their slots; `first_slot` where these are one run."""
        group, at = self._group[layer], self._index[layer]
        kv_write(self._keys_LSGE[group][at], self._values_LSGE[group][at], slots_T, first_slot, keys_TGE, values_TGE)

    def move(self, source: list[int], target: list[int]) -> None:
        """Copies slots to slots in every layer: how an accepted path reaches its positions."""
        pairs = [(s, t) for s, t in zip(source, target, strict=True) if s != t]
        if pairs:
            sources, targets = int_tensor(pairs, self.device).unbind(1)
            path_commit((*self._keys_LSGE, *self._values_LSGE), sources[None], targets[None])

    def gather(self, layer: int, table: PageTable, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a sequence's first `num_tokens` positions, contiguous."""
        slots = torch.tensor(
            [table.slot(position) for position in range(num_tokens)], dtype=torch.int64, device=self.device
        )
        keys, values = self.layer(layer)
        return keys[slots], values[slots]

    def resize(self, num_pages: int) -> None:
        """Follows the pool: room for `num_pages` pages, contents kept."""
        self._addresses = None
        slots = num_pages * self.pool.page_size
        for group in (self._keys_LSGE, self._values_LSGE):
            for i, old in enumerate(group):
                new = on_huge_pages(old.new_empty(old.shape[0], slots + 1, *old.shape[2:])).zero_()
                kept = min(slots, self.scratch_slot)
                new[:, :kept] = old[:, :kept]
                group[i] = new
        self.scratch_slot = slots
        if self.graphs is not None:
            self.graphs.clear()

    def copy_pages(self, source: list[int], target: list[int]) -> None:
        size = self.pool.page_size
        self.move(
            [page * size + s for page in source for s in range(size)],
            [page * size + s for page in target for s in range(size)],
        )

    def release(self) -> None:
        """Lets go of the pool; the cache is not used afterwards."""
        self.pool.detach(self)

    def _empty(self, layers: int, heads: int, size: int) -> Tensor:
        return torch.empty(layers, 1, heads, size, dtype=self.dtype, device=self.device)
