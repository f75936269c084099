"""The invariant Triton kernels: a token's attention has the same bits alone, in a chunk and as a tree's branch."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from specdec.kernels.dispatch import is_interpreting
from specdec.kernels.tree_attention import AttentionPlan, SequencePlan, tree_attention

DEVICE = "cpu" if is_interpreting() else "cuda"
HEADS, GROUPS = 6, 2
OPTIONS = {
    "plain": {},
    "window": {"window": 7},
    "all": {"window": 70, "softcap": 1.5, "sinks_H": torch.linspace(-2, 3, HEADS, device=DEVICE)},
}


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv("SPECDEC_KERNELS", "triton")


@dataclass
class Text:
    """One text's queries, keys and values by position."""

    query_THE: Tensor
    key_TGE: Tensor
    value_TGE: Tensor

    @staticmethod
    def random(length: int, size: int, dtype: torch.dtype, seed: int) -> Text:
        generator = torch.Generator().manual_seed(seed)
        shapes = (length, HEADS, size), (length, GROUPS, size), (length, GROUPS, size)
        query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
        # Outliers, as real keys have them: they bring out differences that rounding mostly hides.
        key *= torch.linspace(-2, 2, size).exp()
        return Text(*(one.to(DEVICE, dtype) for one in (query, key, value)))

    def span(self, start: int, stop: int) -> Text:
        return Text(self.query_THE[start:stop], self.key_TGE[start:stop], self.value_TGE[start:stop])


class Forward:
    """A packed forward of several sequences, each on slots drawn at random; what nobody wrote holds NaN."""

    def __init__(self, num_slots: int, like: Text, seed: int) -> None:
        self.free = list(range(num_slots))
        random.Random(seed).shuffle(self.free)
        self.keys, self.values = (
            torch.full((num_slots, *one.shape[1:]), torch.nan, dtype=one.dtype, device=DEVICE)
            for one in (like.key_TGE, like.value_TGE)
        )
        self.parts: list[SequencePlan] = []
        self.queries: list[Tensor] = []
        self.row = 0

    def add(self, before: Text, new: Text, mask_QM: Tensor | None = None, depths: Tensor | None = None) -> slice:
        """A sequence of committed tokens and new ones; the rows of the latter."""
        seen, count = len(before.query_THE), len(new.query_THE)
        slots = torch.tensor([self.free.pop() for _ in range(seen + count)], device=DEVICE)
        self.keys[slots] = torch.cat([before.key_TGE, new.key_TGE])
        self.values[slots] = torch.cat([before.value_TGE, new.value_TGE])
        positions = seen + (torch.arange(count) if depths is None else depths)
        mask = None if mask_QM is None else mask_QM.to(DEVICE)
        self.parts.append(SequencePlan(self.row, count, seen, mask, positions.to(DEVICE), None, slots))
        self.queries.append(new.query_THE)
        rows = slice(self.row, self.row + count)
        self.row += count
        return rows

    def run(self, **options: object) -> Tensor:
        plan = AttentionPlan(torch.zeros(self.row, dtype=torch.int64, device=DEVICE), None, self.parts)
        return tree_attention(torch.cat(self.queries), self.keys, self.values, plan, scaling=0.4, **options)


def alone(text: Text, start: int, **options: object) -> Tensor:
    """Token by token, from position `start` on."""
    outs = []
    for at in range(start, len(text.query_THE)):
        forward = Forward(len(text.query_THE), text, seed=at)
        forward.add(text.span(0, at), text.span(at, at + 1))
        outs.append(forward.run(**options))
    return torch.cat(outs)


def add_tree(forward: Forward, text: Text, start: int, draw: random.Random) -> list[int]:
    """A tree in which the text goes on from `start`, with distractors everywhere; the rows of the text's own nodes."""
    own, others = len(text.query_THE) - start, 9
    strangers = Text.random(others, text.query_THE.shape[2], text.query_THE.dtype, seed=77)
    order = sorted([*range(own), *draw.choices(range(own), k=others)])
    path: list[int] = []
    parents, rows, taken = [], [], 0
    for depth in order:
        if len(path) == depth:
            parents.append(path[-1] if path else -1)
            path.append(len(parents) - 1)
            rows.append((text, start + depth))
        else:
            parents.append(draw.randrange(-1, len(parents)))
            rows.append((strangers, taken))
            taken += 1
    seen = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node] = seen[parent]
        seen[node, node] = True
    new = Text(*(torch.stack([getattr(of, name)[i] for of, i in rows]) for name in vars(text)))
    where = forward.add(text.span(0, start), new, seen, seen.sum(1) - 1)
    return [where.start + node for node in path]


def in_company(text: Text, start: int, **options: object) -> dict[str, Tensor]:
    """The same tokens in a chunk of all, in two chunks, and as a branch of a tree; every time beside other sequences."""
    size, dtype = text.query_THE.shape[2], text.query_THE.dtype
    mates = [Text.random(length, size, dtype, seed=length) for length in (14, 5, 70)]
    room, middle = 4 * len(text.query_THE) + 300, (start + len(text.query_THE)) // 2

    chunk = Forward(room, text, seed=1)
    rows = chunk.add(text.span(0, start), text.span(start, len(text.query_THE)))
    chunk.add(mates[0].span(0, 13), mates[0].span(13, 14))
    pieces = Forward(room, text, seed=2)
    pieces.add(mates[1].span(0, 0), mates[1])
    first = pieces.add(text.span(0, start), text.span(start, middle))
    second = pieces.add(text.span(0, middle), text.span(middle, len(text.query_THE)))
    tree = Forward(room, text, seed=3)
    tree.add(mates[2].span(0, 67), mates[2].span(67, 70))
    nodes = add_tree(tree, text, start, random.Random(start))
    tree.add(mates[0].span(0, 10), mates[0].span(10, 14), torch.ones(4, 4).tril().bool(), torch.arange(4))
    found = pieces.run(**options)
    return {
        "chunk": chunk.run(**options)[rows],
        "pieces": torch.cat([found[first], found[second]]),
        "tree": tree.run(**options)[nodes],
    }


# Where the new tokens begin, and how many: inside a tile of 64, across its end, across that of a split (512), from nothing.
PLACES = [(20, 5), (59, 8), (508, 6), (0, 4), (64, 3)]


@pytest.mark.parametrize(
    ("place", "dtype"), [*((place, torch.float32) for place in PLACES), (PLACES[1], torch.bfloat16)], ids=str
)
def test_a_token_has_the_same_bits_in_any_company(place, dtype):
    text = Text.random(sum(place), 64, dtype, seed=place[0])
    wanted = alone(text, place[0], is_invariant=True)
    for name, found in in_company(text, place[0], is_invariant=True).items():
        assert torch.equal(found, wanted), name


@pytest.mark.parametrize(("name", "size"), [("plain", 128), ("window", 24), ("all", 24)])
def test_windows_caps_and_sinks(name, size):
    text = Text.random(70, size, torch.float32, seed=9)
    wanted = alone(text, 62, is_invariant=True, **OPTIONS[name])
    for company, found in in_company(text, 62, is_invariant=True, **OPTIONS[name]).items():
        assert torch.equal(found, wanted), company


def test_the_other_kernel_differs():
    """What the tests above would find."""
    text = Text.random(70, 64, torch.float32, seed=59)
    wanted = alone(text, 59)
    assert not torch.equal(in_company(text, 59)["tree"], wanted)
    torch.testing.assert_close(in_company(text, 59)["tree"], wanted)
