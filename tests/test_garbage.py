"""What is there to stay is left out of collections, and nothing else is."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from specdec.garbage import set_aside


class Node:
    """Part of a cycle, which only the collector can free."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def thaw() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_garbage_goes_and_the_rest_is_looked_at_no_more() -> None:
    gone, kept = weakref.ref(Node()), Node()
    set_aside()
    assert gone() is None
    assert gc.get_freeze_count() > 0 and not any(one is kept for one in gc.get_objects())


def test_what_dies_later_goes_with_the_next_call_and_new_garbage_as_ever() -> None:
    old = Node()
    set_aside()
    later, last = weakref.ref(old), weakref.ref(Node())
    del old
    gc.collect()
    assert later() is not None and last() is None
    set_aside()
    assert later() is None
