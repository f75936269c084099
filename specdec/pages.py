"""Page accounting: who holds which page of the KV cache. Nothing here touches a key or value."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from specdec.int_tensor import sent


class OutOfPages(RuntimeError):
    """Fewer pages are free than were asked for; whoever asked keeps exactly what it had."""

    def __init__(self, wanted: int, free: int, total: int, page_size: int) -> None:
        super().__init__(
            f"{wanted} pages wanted, {free} of {total} free ({page_size} tokens each): "
            f"raise num_pages, or run fewer or shorter sequences at once"
        )
        self.wanted, self.free, self.total = wanted, free, total


class Storage(Protocol):
    """Tensors that hang on a pool's pages: every KV cache that shares its page tables."""

    def resize(self, num_pages: int) -> None: ...

    def copy_pages(self, source: list[int], target: list[int]) -> None: ...


class Holder(Protocol):
    """Whoever holds one reference to each of its pages."""

    @property
    def pages(self) -> list[int]: ...


class PagePool:
    """`num_pages` pages of `page_size` token slots, with a reference count each; lowest free page first.

    Slot s of page p has index `p * page_size + s` in every storage attached to the pool.
    """

    def __init__(self, num_pages: int, page_size: int = 16) -> None:
        if num_pages < 0 or page_size < 1:
            raise ValueError(f"num_pages={num_pages} and page_size={page_size} must be >= 0 and >= 1")
        self.page_size = page_size
        self._references = [0] * num_pages
        # Lowest first keeps a lone sequence in one run of slots, which attention reads without a gather.
        self._free = list(range(num_pages))
        self._storages: list[Storage] = []

    @property
    def num_pages(self) -> int:
        return len(self._references)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def storages(self) -> tuple[Storage, ...]:
        return tuple(self._storages)

    def references(self, page: int) -> int:
        return self._references[page]

    def attach(self, storage: Storage) -> None:
        """Hangs tensors on the pages: they are resized now and whenever the pool grows, and copied when pages are."""
        storage.resize(self.num_pages)
        self._storages.append(storage)

    def detach(self, storage: Storage) -> None:
        self._storages.remove(storage)

    def grow(self, num_pages: int) -> None:
        """Makes the pool hold `num_pages` pages; never fewer than now."""
        if num_pages <= self.num_pages:
            return
        for page in range(self.num_pages, num_pages):
            self._references.append(0)
            heapq.heappush(self._free, page)
        for storage in self._storages:
            storage.resize(self.num_pages)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free pages with one reference each. Raises OutOfPages, having taken none."""
        if count > self.num_free:
            raise OutOfPages(count, self.num_free, self.num_pages, self.page_size)
        pages = [heapq.heappop(self._free) for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        for page in pages:
            assert self._references[page] > 0, f"page {page} is free and cannot be shared"
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        for page in pages:
            assert self._references[page] > 0, f"page {page} is free already"
            self._references[page] -= 1
            if self._references[page] == 0:
                heapq.heappush(self._free, page)

    def copy(self, pages: list[int]) -> list[int]:
        """New pages with the contents of `pages` in every storage; the old ones lose one reference. Raises OutOfPages."""
        fresh = self.allocate(len(pages))
        for storage in self._storages:
            storage.copy_pages(pages, fresh)
        self.release(pages)
        return fresh

    def check(self, holders: Iterable[Holder]) -> None:
        """Proves that every page is free xor held, once per table or cache that lists it. Raises AssertionError."""
        held = [0] * self.num_pages
        for holder in holders:
            pages = holder.pages
            assert len(set(pages)) == len(pages), f"a table or cache lists a page twice: {pages}"
            for page in pages:
                held[page] += 1
        assert held == self._references, f"references {self._references} differ from what tables hold {held}"
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        assert sorted(self._free) == [page for page, count in enumerate(held) if count == 0], "a page leaked"


def page_ends(start: int, end: int, page_size: int) -> range:
    """The positions behind the pages that are full when positions `start`..`end`-1 have been added."""
    return range((start // page_size + 1) * page_size, end + 1, page_size)


class PageTable:
    """The pages of one sequence in order: token position i lies in slot i % page_size of page i // page_size."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.pages: list[int] = []
        self._run = True
        # Steps ask for them more often than pages change.
        self._slots_C: Tensor | None = None

    @property
    def capacity(self) -> int:
        """Token slots held."""
        return len(self.pages) * self.pool.page_size

    @property
    def first_slot(self) -> int | None:
        """Where the table's slots start if its pages lie in one run, else None."""
        return self.pages[0] * self.pool.page_size if self.pages and self._run else None

    def slots(self, device: torch.device | str) -> Tensor:
        """The slot [C] of every position that there is room for, not to be written to; copied once for a device."""
        device = torch.device(device)
        if self._slots_C is None or self._slots_C.device != device:
            size = self.pool.page_size
            slots = np.array(self.pages, dtype=np.int64)[:, None] * size + np.arange(size)
            self._slots_C = sent(torch.from_numpy(slots.ravel()), device)
        return self._slots_C

    def begin(self, pages: list[int]) -> None:
        """Begins an empty table with pages that others hold too; whoever writes to one copies it first."""
        assert not self.pages, "only an empty table begins"
        self.pool.share(pages)
        self.pages = list(pages)
        self._note_change()

    def reserve(self, num_tokens: int, writable_from: int) -> None:
        """Holds slots for `num_tokens` positions, those from `writable_from` on shared with nobody (copy-on-write).

        Raises OutOfPages, having changed nothing.
        """
        size = self.pool.page_size
        first = writable_from // size
        shared = [i for i in range(first, len(self.pages)) if self.pool.references(self.pages[i]) > 1]
        missing = max(0, self.pool.pages_for(num_tokens) - len(self.pages))
        if not shared and not missing:
            return
        if len(shared) + missing > self.pool.num_free:
            raise OutOfPages(len(shared) + missing, self.pool.num_free, self.pool.num_pages, size)
        if shared:
            fresh = self.pool.copy([self.pages[i] for i in shared])
            for i, page in zip(shared, fresh, strict=True):
                self.pages[i] = page
        self.pages += self.pool.allocate(missing)
        self._note_change()

    def slot(self, position: int) -> int:
        page, offset = divmod(position, self.pool.page_size)
        return self.pages[page] * self.pool.page_size + offset

    def behind(self, count: int) -> TableView:
        """The same slots without the first `count`."""
        return TableView(self, count)

    def fork(self) -> PageTable:
        """A second table on the same pages; whoever writes first copies."""
        twin = PageTable(self.pool)
        twin.pages, twin._run, twin._slots_C = list(self.pages), self._run, self._slots_C
        self.pool.share(twin.pages)
        return twin

    def truncate(self, num_tokens: int) -> None:
        """Gives back the pages behind the first `num_tokens` positions."""
        keep = self.pool.pages_for(num_tokens)
        dropped, self.pages = self.pages[keep:], self.pages[:keep]
        self.pool.release(dropped)
        self._note_change()

    def release(self) -> None:
        """Gives back every page."""
        self.truncate(0)

    def _note_change(self) -> None:
        self._run = all(b == a + 1 for a, b in zip(self.pages, self.pages[1:], strict=False))
        self._slots_C = None


class TableView:
    """A table's slots behind its first `skipped` ones, for a network whose entries lie so many slots later; it follows the
    table."""

    def __init__(self, table: PageTable, skipped: int) -> None:
        self._table, self._skipped = table, skipped

    @property
    def capacity(self) -> int:
        return self._table.capacity - self._skipped

    @property
    def first_slot(self) -> int | None:
        first = self._table.first_slot
        return None if first is None else first + self._skipped

    def slots(self, device: torch.device | str) -> Tensor:
        return self._table.slots(device)[self._skipped :]
