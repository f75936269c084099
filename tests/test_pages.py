"""Pages and the tensors behind them: every sequence reads what it wrote, whoever shares, forks, moves or runs out."""

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from torch import Tensor

from specdec.kv_cache import KVCache, LayerShape
from specdec.pages import OutOfPages, PagePool, PageTable

# Keys and values of different sizes and two groups of layers, one of them with two members.
SHAPES = [LayerShape(2, 3, 2), LayerShape(1, 2, 2), LayerShape(2, 3, 2)]
DRAFT_SHAPES = [LayerShape(1, 1, 3)]
KV = list[tuple[Tensor, Tensor]]


def _cache(pool: PagePool, shapes: list[LayerShape] = SHAPES) -> KVCache:
    return KVCache(pool, shapes, torch.float32, "cpu")


def _random_kv(shapes: list[LayerShape], count: int, generator: torch.Generator) -> KV:
    return [
        (
            torch.randn(count, shape.num_kv_heads, shape.key_size, generator=generator),
            torch.randn(count, shape.num_kv_heads, shape.value_size, generator=generator),
        )
        for shape in shapes
    ]


def _write(cache: KVCache, table: PageTable, start: int, kv: KV) -> None:
    slots = [table.slot(start + i) for i in range(len(kv[0][0]))]
    is_run = slots == list(range(slots[0], slots[0] + len(slots)))
    for layer, (keys, values) in enumerate(kv):
        cache.write(layer, torch.tensor(slots), slots[0] if is_run else None, keys, values)


# Every cache on one pool, against one contiguous copy per sequence.


@dataclass
class _Sequence:
    table: PageTable
    kv: list[KV]  # per cache and layer: what the sequence must read

    def __len__(self) -> int:
        return len(self.kv[0][0][0])


SEQUENCE = st.integers(0, 1 << 16)
LENGTH = st.integers(1, 7)


class Pages(RuleBasedStateMachine):
    """Sequences grow, fork, rewrite, draft, roll back and end on a small pool that runs out."""

    happened: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(6, page_size=3)
        self.caches = [_cache(self.pool), _cache(self.pool, DRAFT_SHAPES)]
        self.generator = torch.Generator().manual_seed(0)
        self.sequences: list[_Sequence] = []

    def _pick(self, number: int) -> _Sequence:
        return self.sequences[number % len(self.sequences)]

    def _new_kv(self, count: int) -> list[KV]:
        return [_random_kv(cache.shapes, count, self.generator) for cache in self.caches]

    def _put(self, one: _Sequence, start: int, kv: list[KV]) -> None:
        for cache, part in zip(self.caches, kv, strict=True):
            _write(cache, one.table, start, part)

    def _final(self, one: _Sequence, start: int, kv: list[KV]) -> None:
        """The sequence's first `start` tokens are now followed by `kv`."""
        one.kv = [
            [(torch.cat([k[:start], a]), torch.cat([v[:start], b])) for (k, v), (a, b) in zip(old, new, strict=True)]
            for old, new in zip(one.kv, kv, strict=True)
        ]

    def _reserve(self, one: _Sequence, num_tokens: int, writable_from: int) -> bool:
        """Reserves, or proves that the refusal was due and changed nothing."""
        size, pages = self.pool.page_size, list(one.table.pages)
        holders = Counter(page for other in self.sequences for page in other.table.pages)
        shared = [page for page in pages[writable_from // size :] if holders[page] > 1]
        need = len(shared) + max(0, -(-num_tokens // size) - len(pages))
        free = self.pool.num_pages - len(holders)
        before = [list(other.table.pages) for other in self.sequences]
        try:
            one.table.reserve(num_tokens, writable_from)
        except OutOfPages as error:
            assert (error.wanted, error.free, error.total) == (need, free, self.pool.num_pages)
            assert need > free, "refused although there was room"
            assert [list(other.table.pages) for other in self.sequences] == before
            self.happened["refused"] += 1
            self.happened["refused a copy"] += bool(shared)
            return False
        assert need <= free
        assert self.pool.num_free == free - need, "not exactly the pages that were needed are gone"
        assert one.table.capacity >= num_tokens
        assert one.table.pages[: writable_from // size] == pages[: writable_from // size]
        others = {page for other in self.sequences if other is not one for page in other.table.pages}
        assert not others & set(one.table.pages[writable_from // size :]), "a writable page is shared"
        self.happened["copied"] += len(shared)
        return True

    @precondition(lambda self: len(self.sequences) < 4)
    @rule()
    def new(self) -> None:
        self.sequences.append(_Sequence(PageTable(self.pool), self._new_kv(0)))

    @precondition(lambda self: self.sequences)
    @rule(number=SEQUENCE, count=LENGTH)
    def append(self, number: int, count: int) -> None:
        one = self._pick(number)
        start = len(one)
        if self._reserve(one, start + count, start):
            kv = self._new_kv(count)
            self._put(one, start, kv)
            self._final(one, start, kv)

    @precondition(lambda self: 0 < len(self.sequences) < 4)
    @rule(number=SEQUENCE)
    def fork(self, number: int) -> None:
        one, free = self._pick(number), self.pool.num_free
        self.sequences.append(_Sequence(one.table.fork(), list(one.kv)))
        assert self.pool.num_free == free

    @precondition(lambda self: any(len(one) for one in self.sequences))
    @rule(number=SEQUENCE, back=LENGTH)
    def rewrite(self, number: int, back: int) -> None:
        one = self._pick(number)
        start = max(0, len(one) - back)
        count = len(one) - start
        if count and self._reserve(one, len(one), start):
            kv = self._new_kv(count)
            self._put(one, start, kv)
            self._final(one, start, kv)

    @precondition(lambda self: self.sequences)
    @rule(number=SEQUENCE, nodes=LENGTH, accepted=st.sets(st.integers(1, 6)), give_back=st.booleans())
    def draft(self, number: int, nodes: int, accepted: set[int], give_back: bool) -> None:
        """Nodes are written behind the committed tokens; those on the accepted path move to their positions."""
        one = self._pick(number)
        start = len(one)
        if not self._reserve(one, start + nodes, start):
            return
        kv = self._new_kv(nodes)
        self._put(one, start, kv)
        path = [0, *sorted(node for node in accepted if node < nodes)]
        source = [one.table.slot(start + node) for node in path]
        target = [one.table.slot(start + depth) for depth in range(len(path))]
        for cache in self.caches:
            cache.move(source, target)
        self._final(one, start, [[(keys[path], values[path]) for keys, values in part] for part in kv])
        self.happened["moved"] += source != target
        if give_back:
            one.table.truncate(len(one))

    @precondition(lambda self: self.sequences)
    @rule(number=SEQUENCE, back=LENGTH)
    def roll_back(self, number: int, back: int) -> None:
        one = self._pick(number)
        keep = max(0, len(one) - back)
        one.table.truncate(keep)
        self._final(one, keep, self._new_kv(0))
        assert one.table.capacity < keep + self.pool.page_size

    @precondition(lambda self: self.sequences)
    @rule(number=SEQUENCE)
    def end(self, number: int) -> None:
        one = self._pick(number)
        one.table.release()
        assert one.table.pages == []
        self.sequences.remove(one)

    @precondition(lambda self: self.pool.num_pages < 10)
    @rule(more=st.integers(-2, 2))
    def grow(self, more: int) -> None:
        before = self.pool.num_pages
        self.pool.grow(before + more)
        assert self.pool.num_pages == before + max(more, 0)
        self.happened["grown"] += more > 0

    @invariant()
    def pages_add_up(self) -> None:
        self.pool.check(one.table for one in self.sequences)
        for one in self.sequences:
            pages = one.table.pages
            is_run = bool(pages) and pages == list(range(pages[0], pages[0] + len(pages)))
            assert one.table.first_slot == (pages[0] * self.pool.page_size if is_run else None)
            slots = [one.table.slot(position) for position in range(one.table.capacity)]
            assert one.table.slots("cpu").tolist() == slots

    @invariant()
    def everyone_reads_what_was_written(self) -> None:
        for one in self.sequences:
            for cache, part in zip(self.caches, one.kv, strict=True):
                for layer, (keys, values) in enumerate(part):
                    read_keys, read_values = cache.gather(layer, one.table, len(one))
                    assert torch.equal(read_keys, keys) and torch.equal(read_values, values)


def test_sequences_keep_their_contents() -> None:
    Pages.happened.clear()
    run_state_machine_as_test(
        Pages,
        settings=settings(deadline=None, derandomize=True, max_examples=600, stateful_step_count=40, database=None),
    )
    rare = {"refused", "refused a copy", "copied", "moved", "grown"}
    assert all(Pages.happened[name] > 20 for name in rare), f"hardly tested: {Pages.happened}"


# The pool.


@pytest.mark.parametrize(("num_pages", "page_size"), [(-1, 16), (4, 0), (4, -3)])
def test_impossible_pools_are_refused(num_pages: int, page_size: int) -> None:
    with pytest.raises(ValueError, match=f"num_pages={num_pages} and page_size={page_size}"):
        PagePool(num_pages, page_size)


def test_out_of_pages_says_how_many() -> None:
    pool = PagePool(5, page_size=4)
    table = PageTable(pool)
    table.reserve(9, 0)
    with pytest.raises(OutOfPages, match=r"3 pages wanted, 2 of 5 free \(4 tokens each\): raise num_pages") as caught:
        pool.allocate(3)
    assert (caught.value.wanted, caught.value.free, caught.value.total) == (3, 2, 5)
    with pytest.raises(OutOfPages, match="3 pages wanted, 2 of 5 free"):
        table.reserve(21, 9)
    assert (table.pages, pool.num_free) == ([0, 1, 2], 2)
    pool.check([table])
    table.reserve(20, 9)
    assert pool.num_free == 0


def test_a_refused_copy_changes_nothing() -> None:
    pool = PagePool(3, page_size=2)
    cache, generator = _cache(pool), torch.Generator().manual_seed(0)
    table = PageTable(pool)
    table.reserve(4, 0)
    kv = _random_kv(SHAPES, 4, generator)
    _write(cache, table, 0, kv)
    twin = table.fork()
    with pytest.raises(OutOfPages, match="2 pages wanted, 1 of 3 free"):
        twin.reserve(5, 3)  # one page for the copy and one for the fifth token
    assert twin.pages == table.pages == [0, 1]
    pool.check([table, twin])
    twin.reserve(4, 3)
    assert (table.pages, twin.pages) == ([0, 1], [0, 2])
    pool.check([table, twin])
    for layer, (keys, values) in enumerate(kv):
        for one in (table, twin):
            assert torch.equal(cache.gather(layer, one, 4)[0], keys)
            assert torch.equal(cache.gather(layer, one, 4)[1], values)


def test_pages_behind_a_reserved_length_are_made_writable_too() -> None:
    pool = PagePool(8, page_size=2)
    table = PageTable(pool)
    table.reserve(8, 0)
    twin = table.fork()
    twin.reserve(3, 2)  # shorter than what the table holds
    assert twin.pages[0] == table.pages[0]
    assert not set(twin.pages[1:]) & set(table.pages)
    pool.check([table, twin])


def test_nothing_is_copied_once_the_other_holder_is_gone() -> None:
    pool = PagePool(4, page_size=2)
    table = PageTable(pool)
    table.reserve(4, 0)
    twin = table.fork()
    table.release()
    twin.reserve(4, 0)
    assert (twin.pages, pool.num_free) == ([0, 1], 2)
    pool.check([twin])


def test_a_lone_sequence_lies_in_one_run() -> None:
    pool = PagePool(10, page_size=4)
    table = PageTable(pool)
    assert table.first_slot is None
    for num_tokens in (1, 5, 17, 30):
        table.reserve(num_tokens, num_tokens - 1)
        assert table.first_slot == 0
    other = PageTable(pool)
    other.reserve(3, 0)
    assert other.first_slot == other.pages[0] * 4 == 32
    table.reserve(33, 30)
    assert (table.pages[-1], table.first_slot) == (9, None)
    table.truncate(32)
    assert table.first_slot == 0
    table.release()
    other.release()
    # Whatever was held before, the next lone sequence starts at the front again.
    again = PageTable(pool)
    again.reserve(40, 0)
    assert (again.pages, again.first_slot) == (list(range(10)), 0)


def test_pages_are_given_back_at_page_borders() -> None:
    pool = PagePool(5, page_size=4)
    table = PageTable(pool)
    table.reserve(17, 0)
    for num_tokens, pages in ((17, 5), (16, 4), (13, 4), (12, 3), (1, 1), (0, 0)):
        table.truncate(num_tokens)
        assert (len(table.pages), table.capacity, pool.num_free) == (pages, pages * 4, 5 - pages)
    table.release()
    assert pool.num_free == 5


def test_growing_keeps_contents_and_never_shrinks() -> None:
    pool = PagePool(0, page_size=2)
    cache, table = _cache(pool), PageTable(pool)
    with pytest.raises(OutOfPages, match="1 pages wanted, 0 of 0 free"):
        table.reserve(1, 0)
    pool.grow(2)
    table.reserve(4, 0)
    kv = _random_kv(SHAPES, 4, torch.Generator().manual_seed(1))
    _write(cache, table, 0, kv)
    for num_pages in (7, 3):
        pool.grow(num_pages)
        assert (pool.num_pages, pool.num_free) == (7, 5)
        assert cache.layer(0)[0].shape == (14, 2, 3) and cache.layer(1)[1].shape == (14, 1, 2)
        for layer, (keys, values) in enumerate(kv):
            assert torch.equal(cache.gather(layer, table, 4)[0], keys)
            assert torch.equal(cache.gather(layer, table, 4)[1], values)
    pool.check([table])


def test_a_detached_cache_is_left_alone() -> None:
    pool = PagePool(1, page_size=2)
    cache = _cache(pool)
    cache.release()
    pool.grow(5)
    assert cache.layer(0)[0].shape[0] == 2


# The tensors.


def test_layers_do_not_share_slots() -> None:
    pool = PagePool(2, page_size=2)
    cache = _cache(pool)
    for layer in range(3):
        for part in cache.layer(layer):
            part.fill_(layer + 1)
    assert [float(part.mean()) for layer in range(3) for part in cache.layer(layer)] == [1, 1, 2, 2, 3, 3]


def test_writes_by_slot_and_by_run_agree_and_convert() -> None:
    pool = PagePool(3, page_size=4)
    cache = KVCache(pool, SHAPES, torch.bfloat16, "cpu")
    keys, values = _random_kv(SHAPES, 5, torch.Generator().manual_seed(2))[0]
    cache.write(0, torch.arange(3, 8), 3, keys, values)
    cache.write(2, torch.arange(3, 8), None, keys, values)
    for run, slots in zip(cache.layer(0), cache.layer(2), strict=True):
        assert torch.equal(run, slots)
    assert torch.equal(cache.layer(0)[0][3:8], keys.bfloat16())
    assert bool((cache.layer(0)[0][[0, 1, 2, 8, 9, 10, 11]] == 0).all())
    scattered = torch.tensor([11, 0, 7, 2, 5])
    cache.write(1, scattered, None, *(part.expand(5, 1, 2) for part in torch.arange(10.0).reshape(2, 5, 1, 1)))
    assert cache.layer(1)[0][scattered, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert cache.layer(1)[1][scattered, 0, 0].tolist() == [5, 6, 7, 8, 9]


def test_moves_may_overlap() -> None:
    pool = PagePool(2, page_size=4)
    cache = _cache(pool)
    kv = _random_kv(SHAPES, 8, torch.Generator().manual_seed(3))
    for source, target in (([1, 2], [2, 1]), ([0, 3, 5], [0, 1, 3]), ([1, 3, 4], [3, 4, 5]), ([6], [6]), ([], [])):
        for layer, (keys, values) in enumerate(kv):
            cache.write(layer, torch.arange(8), 0, keys, values)
        cache.move(source, target)
        for layer, parts in enumerate(kv):
            for cached, part in zip(cache.layer(layer), parts, strict=True):
                wanted = part.clone()
                wanted[target] = part[source]
                assert torch.equal(cached, wanted)


# The check must be able to fail.


def _checked() -> tuple[PagePool, PageTable, PageTable]:
    pool = PagePool(6, page_size=2)
    table = PageTable(pool)
    table.reserve(6, 0)
    twin = table.fork()
    twin.reserve(6, 5)
    pool.check([table, twin])
    return pool, table, twin


def test_check_finds_a_table_left_out() -> None:
    pool, table, _ = _checked()
    with pytest.raises(AssertionError, match="references"):
        pool.check([table])


def test_check_finds_a_leak() -> None:
    pool, table, twin = _checked()
    table.pages.pop()  # forgotten, not released
    with pytest.raises(AssertionError, match="references"):
        pool.check([table, twin])


def test_check_finds_a_free_page_that_nobody_can_get() -> None:
    pool, table, twin = _checked()
    pool._free.pop()
    with pytest.raises(AssertionError, match="leaked"):
        pool.check([table, twin])


def test_check_finds_a_wrong_count() -> None:
    pool, table, twin = _checked()
    pool.share([table.pages[0]])
    with pytest.raises(AssertionError, match="references"):
        pool.check([table, twin])


def test_check_finds_a_page_that_is_free_twice() -> None:
    pool, table, twin = _checked()
    pool._free.append(pool._free[0])
    with pytest.raises(AssertionError, match="free twice"):
        pool.check([table, twin])


def test_check_finds_a_page_that_is_free_and_held() -> None:
    pool, table, twin = _checked()
    pool._free.append(table.pages[0])
    with pytest.raises(AssertionError):
        pool.check([table, twin])


def test_check_finds_a_page_that_a_table_lists_twice() -> None:
    pool, table, twin = _checked()
    pool.share([table.pages[1]])
    table.pages.append(table.pages[1])
    with pytest.raises(AssertionError, match="lists a page twice"):
        pool.check([table, twin])


def test_pages_are_not_freed_or_shared_twice() -> None:
    pool, table, twin = _checked()
    free = pool._free[0]
    with pytest.raises(AssertionError, match=f"page {free} is free already"):
        pool.release([free])
    with pytest.raises(AssertionError, match=f"page {free} is free and cannot be shared"):
        pool.share([free])
    pool.check([table, twin])
