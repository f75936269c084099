"""Features that wait to be read: the right rows whatever pieces they came in, and no more alive than is wanted."""

from __future__ import annotations

import random
from weakref import WeakSet

import pytest
import torch
from torch import Tensor

from specdec.drafters.features import Features, PageNote
from specdec.states import PickedStates

LAYERS = (1, 3)


def step(num_rows: int, seed: int) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(num_rows, 4, generator=generator) for layer in LAYERS}


def fuse(each: list[Features]) -> None:
    """Features are twice the states."""
    Features.fuse(each, lambda states: 2 * states)


@pytest.mark.parametrize("seed", range(20))
def test_positions_get_their_own_features(seed: int) -> None:
    """Several texts, of each some rows of every step, read and shared at random."""
    chance = random.Random(seed)
    texts = [Features(first) for first in (0, 5, 2)]
    truth = [dict[int, Tensor]() for _ in texts]
    for number in range(30):
        counts = [chance.choice([1, 1, 1, 3, 20]) for _ in texts]
        states, rows, at = step(sum(counts) + 2, 100 * seed + number), list[slice | list[int]](), 0
        for count in counts:
            run = [*range(at, at + count)]
            rows.append(slice(at, at + count) if chance.random() < 0.5 else chance.sample(run, count))
            at += count
        picked = PickedStates.joined([PickedStates(states, one) for one in rows], LAYERS, most=4)
        for text, known, count, hidden, own in zip(texts, truth, counts, picked, rows, strict=True):
            assert hidden.shape == (count, 8) and hidden.untyped_storage().nbytes() <= 4 * hidden.nbytes
            wanted = 2 * torch.cat([states[layer] for layer in LAYERS], 1)[own]
            known |= {text.end + i: wanted[i] for i in range(count)}
            text.add(hidden)
        for text, known in zip(texts, truth, strict=True):
            start = chance.randint(text.first, text.end)
            part = text.part(start, chance.randint(start, text.end))
            if part.end > part.first:
                held = [*part._raw, *([] if part._fused is None else [part._fused])]
                assert all(one.untyped_storage().nbytes() == one.nbytes for one in held)
                fuse([part])
                wanted = torch.stack([known[i] for i in range(part.first, part.end)])
                assert torch.equal(part.take(start, part.end), wanted)
        reading = [one for one in texts if one.end > one.first and chance.random() < 0.4]
        fuse(reading)
        for text in reading:
            known = truth[texts.index(text)]
            start = text.first
            end = chance.randint(start + 1, text.end)
            assert torch.equal(text.take(start, end), torch.stack([known[i] for i in range(start, end)]))
            # The last one may be asked for again.
            assert text.first == end - 1 and torch.equal(text.take(end - 1, end)[0], known[end - 1])


def test_copies_for_many_rows_are_few() -> None:
    """A hundred rows of a step with a long prompt: each would keep all of it alive, and a copy of each is slow."""
    states = step(600, 0)
    picked = [PickedStates(states, slice(i, i + 1)) for i in range(100)] + [PickedStates(states, slice(100, 600))]
    found = PickedStates.joined(picked, (3,), most=32)
    assert len({one.untyped_storage().data_ptr() for one in found}) == 5
    for old, new in zip(picked, found, strict=True):
        assert torch.equal(old[3], new)


def test_a_page_waits_until_all_of_it_is_read() -> None:
    unread: WeakSet[PageNote] = WeakSet()
    features = Features(3)
    features.add(step(5, 1)[1])
    note = PageNote(3, 7, features, unread)
    assert len(unread) == 1
    note.read_to(5)
    assert note.features.first == 5 and not note.is_read and len(unread) == 1
    note.read_to(12)
    assert note.is_read and note.start == 7 and not unread and (features.first, features.end) == (7, 8)
    features.add(step(1, 2)[1])
    PageNote(8, 8, features, unread)
    assert not unread
