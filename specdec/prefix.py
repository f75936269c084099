"""Prefixes that requests share: full pages of keys and values, found by their tokens and kept when a request has ended."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from specdec.pages import PagePool
from specdec.sequence import Sequence


@dataclass(eq=False)
class PrefixPage:
    """A full page of tokens that follow those of its parent. `page` holds their keys and values (None: a request that runs
    has announced them); `num_users` sequences have it on their way. `note` is the drafter's."""

    tokens: tuple[int, ...]
    parent: PrefixPage | None
    page: int | None = None
    is_coming: bool = False
    num_users: int = 0
    note: object = None
    children: dict[tuple[int, ...], PrefixPage] = field(default_factory=dict)


class PrefixCache:
    """A tree of pages, one edge per page of tokens, so what is found has the very same tokens before it (at the granularity of
    pages what Zheng et al. 2024, SGLang, section 3, call a radix tree).

    The cache holds one reference to each page. Pages of no user are evicted, the least recently used first; whoever uses a
    page uses all before it, so that order begins with leaves. The target never writes to pages in the tree. With
    `is_enabled=False` nothing is kept.
    """

    def __init__(self, pool: PagePool, is_enabled: bool = True) -> None:
        self._pool, self._is_enabled = pool, is_enabled
        self._root = PrefixPage((), None)
        self._idle: OrderedDict[PrefixPage, None] = OrderedDict()
        self._paths: dict[int, list[PrefixPage]] = {}
        self._announced: dict[int, list[PrefixPage]] = {}

    @property
    def pages(self) -> list[int]:
        """Every page that the cache holds."""
        found, ahead = [], list(self._root.children.values())
        while ahead:
            node = ahead.pop()
            ahead += node.children.values()
            if node.page is not None:
                found.append(node.page)
        return found

    @property
    def num_idle(self) -> int:
        """Pages that nobody uses: these can be evicted."""
        return len(self._idle)

    def is_idle(self, node: PrefixPage) -> bool:
        return node in self._idle

    def find(self, one: Sequence) -> tuple[list[PrefixPage], PrefixPage | None]:
        """The full pages before the root that are there, and the next one if another request is about to compute it."""
        node, found = self._root, list[PrefixPage]()
        for tokens in self._pages_of(one, 0, one.root_position) if self._is_enabled else ():
            child = node.children.get(tokens)
            if child is None:
                break
            if child.page is None:
                return found, child
            found.append(child)
            node = child
        return found, None

    def enter(self, one: Sequence, found: Seq[PrefixPage]) -> None:
        """Gives a sequence without pages the ones that were found."""
        pages = [node.page for node in found if node.page is not None]
        assert len(pages) == len(found) and one.id not in self._paths
        one.table.begin(pages)
        for node in found:
            self._use(node)
        self._paths[one.id] = list(found)

    def announce(self, one: Sequence) -> None:
        """Others with the same prompt may wait for its pages instead of computing them too."""
        path = self._paths[one.id]
        node = path[-1] if path else self._root
        chain = []
        for tokens in self._pages_of(one, len(path), one.root_position) if self._is_enabled else ():
            if tokens in node.children:
                break
            child = PrefixPage(tokens, node, is_coming=True)
            node.children[tokens] = child
            chain.append(child)
            node = child
        if chain:
            self._announced[one.id] = chain

    def withdraw(self, one: Sequence) -> None:
        """Whoever waits for pages of this sequence that have not come waits no longer."""
        missing = [node for node in self._announced.pop(one.id, ()) if node.page is None]
        for node in missing:
            node.is_coming = False
        if missing:
            self._detach(missing[0])

    def extend(self, one: Sequence, num_final: int, note: Callable[[int, int], object] = lambda id, end: None) -> None:
        """Takes in the full pages among a sequence's first `num_final` positions, whose contents will not change, each with the
        `note` of whoever wants to tell those something who find it: of the sequence and the position behind the page."""
        assert num_final <= one.root_position, "a page holds tokens that are not in the text"
        path = self._paths[one.id]
        if not self._is_enabled or num_final < (len(path) + 1) * self._pool.page_size:
            return
        for tokens in self._pages_of(one, len(path), num_final):
            node = path[-1] if path else self._root
            child = node.children.get(tokens)
            if child is None:
                child = node.children[tokens] = PrefixPage(tokens, node)
            if child.page is None:
                child.page, child.is_coming = one.table.pages[len(path)], False
                child.note = note(one.id, (len(path) + 1) * self._pool.page_size)
                self._pool.share([child.page])
            self._use(child)
            path.append(child)

    def leave(self, one: Sequence) -> None:
        """The sequence is about to give its pages back; the cache keeps what it has taken in."""
        self.withdraw(one)
        for node in reversed(self._paths.pop(one.id, [])):
            node.num_users -= 1
            if not node.num_users:
                self._idle[node] = None

    def evict(self, count: int) -> int:
        """Frees up to `count` pages that nobody uses, the least recently used first; how many there were."""
        freed = 0
        while freed < count and self._idle:
            node, _ = self._idle.popitem(last=False)
            assert node.page is not None
            self._give_up(node)
            self._detach(node)
            self._pool.release([node.page])
            freed += 1
        return freed

    def check(self) -> None:
        """Proves that users are counted and idle pages are the cache's alone. Raises AssertionError."""
        users: dict[PrefixPage, int] = {}
        for path in self._paths.values():
            for node in path:
                users[node] = users.get(node, 0) + 1
        assert all(node.num_users == count for node, count in users.items()), "users miscounted"
        assert all(node not in users and node.num_users == 0 for node in self._idle), "an idle page has a user"
        idle_pages = [node.page for node in self._idle if node.page is not None]
        assert all(self._pool.references(page) == 1 for page in idle_pages), "an idle page is held elsewhere"
        known = {node.page for node in (*users, *self._idle)}
        assert known == set(self.pages), "a page is neither used nor idle"

    def _pages_of(self, one: Sequence, first: int, num_positions: int) -> list[tuple[int, ...]]:
        size = self._pool.page_size
        return [
            tuple(one.token_ids[start : start + size]) for start in range(first * size, num_positions - size + 1, size)
        ]

    def _use(self, node: PrefixPage) -> None:
        node.num_users += 1
        self._idle.pop(node, None)

    def _give_up(self, node: PrefixPage) -> None:
        """Nobody will find what has been announced behind a page that goes, as when another request has overtaken the one that
        announced: whoever waits for it looks again."""
        ahead = list(node.children.values())
        while ahead:
            child = ahead.pop()
            assert child.page is None, "a page goes after those behind it"
            child.is_coming = False
            ahead += child.children.values()

    def _detach(self, node: PrefixPage) -> None:
        assert node.parent is not None
        del node.parent.children[node.tokens]
