"""Token trees: what construction refuses, what the builders build, and what is derived from parents."""

import random
import re
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec import tree_checks
from specdec.tree import DrawKind, TokenTree, TreeSpec

FIXED, IID, WITHOUT = DrawKind.FIXED, DrawKind.IID, DrawKind.WITHOUT_REPLACEMENT
VOCAB = 8
Row = tuple[list[int], list[int]]

LAW = [0.0, 0.25, 0.25, 0.25, 0.25, 0.0, 0.0, 0.0]


def _fields(**changes: Any) -> dict[str, Any]:
    """Two rows of i.i.d. draws: 0 -> (1, 2) and 1 -> 3, node 1 drawn twice; 0 -> (1, 2) and a padding node."""
    fields: dict[str, Any] = {
        "tokens_BN": torch.tensor([[5, 1, 2, 3], [6, 4, 3, 0]]),
        "parents_BN": torch.tensor([[-1, 0, 0, 1], [-1, 0, 0, -1]]),
        "num_nodes_B": torch.tensor([4, 3]),
        "draws_BM": torch.tensor([[1, 2, 1, 3], [2, 1, -1, -1]]),
        "kinds_BM": torch.full((2, 4), IID),
        "draft_laws_BNV": torch.tensor(LAW).repeat(2, 4, 1),
    }
    return fields | changes


def _with(name: str, at: tuple[int, ...], value: float) -> dict[str, Any]:
    values = _fields()[name].clone()
    values[at] = value
    return {name: values}


def _fixed(**changes: Any) -> dict[str, Any]:
    fields = {"kinds_BM": torch.full((2, 4), FIXED), "draft_laws_BNV": None, "vocab_size": VOCAB}
    return fields | {"draws_BM": torch.tensor([[1, 2, 3, -1], [2, 1, -1, -1]])} | changes


def test_valid_tree_is_accepted() -> None:
    TokenTree(**_fields())
    TokenTree(**_fields(**_fixed()))
    TokenTree(**_fields(**_with("draft_laws_BNV", (1, 2), 7.0)))  # a node without drawn children needs no law


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            _with("parents_BN", (0, 1), 2), r"row 0.*\[-1, 2, 0, 1\].*before their children", id="child-first"
        ),
        pytest.param(_with("parents_BN", (0, 2), 2), r"row 0.*\[-1, 0, 2, 1\]", id="own-parent"),
        pytest.param(_with("parents_BN", (1, 0), 0), r"row 1.*\[0, 0, 0, -1\].*-1 for root", id="root-with-parent"),
        pytest.param(_with("parents_BN", (1, 2), -1), r"row 1.*\[-1, 0, -1, -1\]", id="second-root"),
        pytest.param(_with("parents_BN", (1, 3), 0), r"row 1.*\[-1, 0, 0, 0\].*padding", id="padding-with-parent"),
        pytest.param(_with("num_nodes_B", (1,), 0), r"num_nodes \[4, 0\].*1\.\.4", id="no-nodes"),
        pytest.param(_with("num_nodes_B", (0,), 5), r"num_nodes \[5, 3\].*1\.\.4", id="too-many-nodes"),
        pytest.param(_with("tokens_BN", (0, 3), VOCAB), "token 8 is outside the vocabulary of 8", id="token-too-large"),
        pytest.param(_with("tokens_BN", (1, 0), VOCAB), "token 8 is outside", id="root-too-large"),
        pytest.param(_with("tokens_BN", (0, 1), -2), "token -2 is outside", id="token-negative"),
        pytest.param(
            _fixed(**_with("tokens_BN", (0, 3), 9)), "token 9 is outside the vocabulary of 8", id="vocab-size"
        ),
        pytest.param(
            _fixed(vocab_size=None, **_with("tokens_BN", (0, 3), -1)),
            "token -1 is outside",
            id="no-vocab-size",
        ),
        pytest.param(
            _with("draws_BM", (1, 2), 3), r"row 1.*\[2, 1, 3, -1\].*1\.\.num_nodes-1", id="draw-names-padding"
        ),
        pytest.param(_with("draws_BM", (0, 3), 4), r"row 0.*\[1, 2, 1, 4\]", id="draw-beyond"),
        pytest.param(_with("draws_BM", (0, 2), 0), r"row 0.*\[1, 2, 0, 3\]", id="draw-names-root"),
        pytest.param(_with("draws_BM", (1, 3), -2), r"row 1.*\[2, 1, -1, -2\]", id="draw-below-padding"),
        pytest.param(_with("draws_BM", (1, 0), 1), "row 1: node 2 .*reached by at least one draw", id="unreached"),
        pytest.param(_with("kinds_BM", (0, 1), 7), "row 0.*kind 7", id="unknown-kind"),
        pytest.param(_with("tokens_BN", (0, 2), 1), "row 0: token 1 .*distinct", id="twin-nodes-iid"),
        pytest.param(
            _with("tokens_BN", (1, 2), 4)
            | {"kinds_BM": torch.full((2, 4), WITHOUT)}
            | {"draws_BM": _fixed()["draws_BM"]},
            "row 1: token 4 .*distinct",
            id="twin-nodes-without-replacement",
        ),
        pytest.param(_fixed(**_with("tokens_BN", (1, 2), 4)), "row 1: token 4 .*distinct", id="twin-nodes-fixed"),
        pytest.param(
            _with("kinds_BM", (0, 0), WITHOUT),
            "row 0: token 1 .*distinct",
            id="drawn-twice-without-replacement",
        ),
        pytest.param(_with("kinds_BM", (0, 2), FIXED), "row 0: token 1 .*distinct", id="drawn-twice-fixed"),
        pytest.param({"draft_laws_BNV": None}, "need draft_laws_BNV", id="no-laws"),
        pytest.param(_with("draft_laws_BNV", (0, 0, 1), 0.3), "row 0.*node 0.*sum", id="law-too-heavy"),
        pytest.param({"draft_laws_BNV": torch.tensor(LAW).repeat(2, 4, 1) * 0.999}, "sum", id="law-too-light"),
        pytest.param(
            {"draft_laws_BNV": torch.tensor([-0.25, 0.5, 0.25, 0.25, 0.25, 0, 0, 0]).repeat(2, 4, 1)},
            "row 0.*non-negative",
            id="law-negative",
        ),
        pytest.param(_with("draft_laws_BNV", (0, 1, 7), float("nan")), "row 0.*node 1.*nan", id="law-nan"),
        pytest.param(
            {"draft_laws_BNV": torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0, 0]).repeat(2, 4, 1)},
            "row 0: drafted token 2 has probability zero",
            id="zero-at-drawn-token",
        ),
        pytest.param({"draft_laws_BNV": torch.tensor(LAW).repeat(2, 3, 1)}, r"\(2, 3, 8\)", id="laws-shape-nodes"),
        pytest.param({"draft_laws_BNV": torch.tensor(LAW).repeat(2, 1)}, r"\(2, 8\)", id="laws-shape-flat"),
        pytest.param({"tokens_BN": torch.tensor([5, 1, 2, 3])}, r"tokens \(4,\)", id="tokens-flat"),
        pytest.param({"tokens_BN": torch.zeros(2, 0).long()}, r"tokens \(2, 0\).*N >= 1", id="no-root"),
        pytest.param({"parents_BN": torch.tensor([[-1, 0], [-1, 0]])}, r"parents \(2, 2\)", id="parents-shape"),
        pytest.param({"num_nodes_B": torch.tensor([[4, 3]])}, r"num_nodes \(1, 2\)", id="num-nodes-shape"),
        pytest.param({"kinds_BM": torch.full((2, 3), IID)}, r"draws \(2, 4\).*kinds \(2, 3\)", id="kinds-shape"),
        pytest.param(
            {"draws_BM": torch.tensor([[1]]), "kinds_BM": torch.tensor([[1]])},
            r"draws \(1, 1\)",
            id="draws-batch",
        ),
        pytest.param(
            {"draws_BM": torch.tensor([1, 1]), "kinds_BM": torch.tensor([1, 1])},
            r"draws \(2,\)",
            id="draws-flat",
        ),
    ],
)
def test_broken_trees_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        TokenTree(**_fields(**changes))
    assert re.search(message, str(caught.value)), str(caught.value)


def test_same_token_below_different_parents_is_no_twin() -> None:
    tree = TokenTree.from_paths([1], [[[2, 3], [3, 3], [2, 2]]], vocab_size=4)
    assert tree.tokens_BN.tolist() == [[1, 2, 3, 3, 3, 2]]
    assert tree.parents_BN.tolist() == [[-1, 0, 1, 0, 3, 1]]


def test_float64_laws_are_held_to_a_tighter_sum() -> None:
    laws = torch.tensor(LAW, dtype=torch.float64).repeat(2, 4, 1)
    TokenTree(**_fields(draft_laws_BNV=laws))
    with pytest.raises(ValueError, match="sum"):
        TokenTree(**_fields(draft_laws_BNV=laws * (1 + 1e-7)))
    TokenTree(**_fields(draft_laws_BNV=(laws * (1 + 1e-7)).float()))


def test_padding_tokens_may_be_anything() -> None:
    fields = _fields()
    fields["tokens_BN"][1, 3] = 99
    assert TokenTree(**fields).depth_BN.tolist() == [[0, 1, 1, 2], [0, 1, 1, -1]]


def test_root_trees() -> None:
    tree = TokenTree.roots(torch.tensor([3, 7, 7]), vocab_size=VOCAB)
    assert (tree.batch_size, tree.max_nodes) == (3, 1)
    assert tree.depth_BN.tolist() == [[0], [0], [0]]
    assert tree.draws_BM.shape == (3, 0)
    assert tree.spec == TreeSpec(frozenset(), is_chain=True, has_laws=False)
    assert not tree.spec.is_sampled
    with pytest.raises(ValueError, match="token 8 is outside"):
        TokenTree.roots(torch.tensor([3, 8]), vocab_size=VOCAB)


def test_chain() -> None:
    tokens = torch.tensor([[1, 2, 2, 3], [4, 1, 1, 1]])
    tree = TokenTree.chain(tokens, vocab_size=VOCAB)
    assert tree.depth_BN.tolist() == [[0, 1, 2, 3]] * 2
    assert tree.draws_BM.tolist() == [[1, 2, 3]] * 2
    assert tree.path(3, 1) == [0, 1, 2, 3]
    assert tree.spec == TreeSpec(frozenset({FIXED}), is_chain=True, has_laws=False)
    laws = torch.full((2, 4, VOCAB), 1 / VOCAB)
    sampled = TokenTree.chain(tokens, laws, IID)
    assert sampled.spec == TreeSpec(frozenset({IID}), is_chain=True)
    assert sampled.spec.is_sampled
    assert sampled.draft_laws_BNV is laws
    with pytest.raises(ValueError, match="need draft_laws_BNV"):
        TokenTree.chain(tokens, kind=WITHOUT)
    with pytest.raises(ValueError, match="token 4 is outside the vocabulary of 4"):
        TokenTree.chain(tokens, laws[..., :4] * 2, IID)


def test_from_paths_merges_common_prefixes() -> None:
    tree = TokenTree.from_paths([9, 8, 7], [[[1, 2], [1, 3, 4], [1, 2]], [], [[5]]], vocab_size=10)
    assert tree.tokens_BN.tolist() == [[9, 1, 2, 3, 4], [8, 0, 0, 0, 0], [7, 5, 0, 0, 0]]
    assert tree.parents_BN.tolist() == [[-1, 0, 1, 1, 3], [-1] * 5, [-1, 0, -1, -1, -1]]
    assert tree.num_nodes_B.tolist() == [5, 1, 2]
    assert tree.draws_BM.tolist() == [[1, 2, 3, 4], [-1] * 4, [1, -1, -1, -1]]
    with pytest.raises(ValueError):
        TokenTree.from_paths([9, 8], [[[1]]])


def test_from_parents() -> None:
    tokens, parents = torch.tensor([[1, 2, 3], [1, 2, 0]]), torch.tensor([[-1, 0, 0], [-1, 0, -1]])
    tree = TokenTree.from_parents(tokens, parents, torch.tensor([3, 2]), vocab_size=4)
    assert tree.draws_BM.tolist() == [[1, 2], [1, -1]]
    assert tree.spec == TreeSpec(frozenset({FIXED}), is_chain=False, has_laws=False)
    with pytest.raises(ValueError, match="row 1"):
        TokenTree.from_parents(tokens, parents)  # without counts the padding is a second root


def _naive_path(parents: list[int], node: int) -> list[int]:
    return [*_naive_path(parents, parents[node]), node] if parents[node] >= 0 else [node]


@st.composite
def ragged_rows(draw: st.DrawFn) -> list[Row]:
    """Up to four trees of up to nine nodes: wide, deep and bare ones, siblings with distinct tokens."""
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        parents = [-1] + [draw(st.integers(0, node - 1)) for node in range(1, draw(st.integers(1, 9)))]
        tokens = [draw(st.integers(0, VOCAB))]
        for node in range(1, len(parents)):
            # A node's rank among its siblings keeps them distinct; a cousin may carry the same token.
            tokens.append(parents[1:node].count(parents[node]))
        rows.append((tokens, parents))
    return rows


@settings(deadline=None, derandomize=True, max_examples=80)
@given(ragged_rows())
def test_derived_values_equal_a_naive_walk(rows: list[Row]) -> None:
    tree = TokenTree.from_lists(rows, vocab_size=VOCAB + 1)
    for b, (tokens, parents) in enumerate(rows):
        paths = [_naive_path(parents, node) for node in range(len(parents))]
        padding = tree.max_nodes - len(parents)
        assert tree.tokens_BN[b].tolist() == tokens + [0] * padding
        assert tree.is_node_BN[b].tolist() == [True] * len(parents) + [False] * padding
        assert tree.depth_BN[b].tolist() == [len(path) - 1 for path in paths] + [-1] * padding
        wanted = [[m in path for m in range(tree.max_nodes)] for path in paths] + [[False] * tree.max_nodes] * padding
        assert tree.ancestors_BNN[b].tolist() == wanted
        assert [tree.path(node, b) for node in range(len(parents))] == paths
    drafted = any(len(tokens) > 1 for tokens, _ in rows)
    is_chain = all(parents == list(range(-1, len(parents) - 1)) for _, parents in rows)
    assert tree.spec == TreeSpec(frozenset({FIXED} if drafted else ()), is_chain, has_laws=False)


def _random_sampled_tree(rng: random.Random, kind: DrawKind, batch: int) -> TokenTree:
    """Trees drawn for real: each node's children are draws of its own random law, duplicates merged."""
    rows: list[tuple[list[int], list[int], list[int]]] = []
    laws: list[Tensor] = []
    for _ in range(batch):
        tokens, parents, draws, row_laws = [rng.randrange(VOCAB)], [-1], [], []
        for node in range(rng.randint(1, 5)):
            if node >= len(tokens):
                break
            law = torch.tensor([rng.random() if rng.random() < 0.7 else 0.0 for _ in range(VOCAB - 1)] + [0.1])
            row_laws.append(law / law.sum())
            support = [token for token in range(VOCAB) if law[token] > 0]
            width = rng.randint(0, 3)
            drawn = rng.choices(support, k=width) if kind == IID else rng.sample(support, min(width, len(support)))
            children: dict[int, int] = {}
            for token in drawn:
                if token not in children:
                    children[token] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                draws.append(children[token])
        rows.append((tokens, parents, draws))
        laws.append(torch.stack(row_laws))
    nodes, width = max(len(row[0]) for row in rows), max(len(row[2]) for row in rows)

    def padded(values: Seq[int], size: int, fill: int) -> list[int]:
        return [*values, *[fill] * (size - len(values))]

    return TokenTree(
        torch.tensor([padded(row[0], nodes, 0) for row in rows]),
        torch.tensor([padded(row[1], nodes, -1) for row in rows]),
        torch.tensor([len(row[0]) for row in rows]),
        torch.tensor([padded(row[2], width, -1) for row in rows], dtype=torch.int64).reshape(batch, width),
        torch.full((batch, width), kind),
        torch.stack([torch.cat([law, law.new_zeros(nodes - len(law), VOCAB)]) for law in laws]),
    )


@pytest.mark.parametrize("kind", [IID, WITHOUT])
def test_trees_drawn_for_real_are_accepted_and_survive_concat(kind: DrawKind) -> None:
    rng = random.Random(int(kind))
    for _ in range(25):
        parts = [_random_sampled_tree(rng, kind, rng.randint(1, 3)) for _ in range(3)]
        whole, first = TokenTree.concat(parts), 0
        assert whole.batch_size == sum(part.batch_size for part in parts)
        for part in parts:
            rows, n, m = slice(first, first + part.batch_size), part.max_nodes, part.draws_BM.shape[1]
            for name, fill, width in (("tokens_BN", 0, n), ("parents_BN", -1, n), ("draws_BM", -1, m)):
                values = getattr(whole, name)[rows]
                torch.testing.assert_close(values[:, :width], getattr(part, name))
                assert bool((values[:, width:] == fill).all())
            torch.testing.assert_close(whole.depth_BN[rows, :n], part.depth_BN)
            assert whole.draft_laws_BNV is not None and part.draft_laws_BNV is not None
            torch.testing.assert_close(whole.draft_laws_BNV[rows, :n], part.draft_laws_BNV)
            first += part.batch_size
        assert whole.spec.kinds == frozenset().union(*(part.spec.kinds for part in parts))
        # Said of each row alone and of all together, "a chain" must mean the same.
        alone = [_row(whole, b).spec.is_chain for b in range(whole.batch_size)]
        assert whole.spec.is_chain == all(alone)


def _row(tree: TokenTree, row: int) -> TokenTree:
    at, n = slice(row, row + 1), int(tree.num_nodes_B[row])
    count = int((tree.draws_BM[row] >= 0).sum())
    laws = None if tree.draft_laws_BNV is None else tree.draft_laws_BNV[at, :n]
    draws, kinds = tree.draws_BM[at, :count], tree.kinds_BM[at, :count]
    return TokenTree(tree.tokens_BN[at, :n], tree.parents_BN[at, :n], tree.num_nodes_B[at], draws, kinds, laws)


def test_concat_of_one_is_itself_and_mixes_kinds() -> None:
    fixed = TokenTree.chain(torch.tensor([[1, 2]]), vocab_size=VOCAB)
    assert TokenTree.concat([fixed]) is fixed
    sampled = replace(TokenTree(**_fields()), adapted=False)
    both = TokenTree.concat([fixed, sampled])
    assert both.spec == TreeSpec(frozenset({FIXED, IID}), is_chain=False, has_laws=True, adapted=False)
    assert both.vocab_size == VOCAB
    assert both.num_nodes_B.tolist() == [2, 4, 3]
    assert both.draft_laws_BNV is not None and both.draft_laws_BNV[0].abs().sum() == 0


def test_a_duplicate_draw_is_no_chain() -> None:
    laws = torch.full((2, 4, VOCAB), 1 / VOCAB)
    tokens, parents = (
        torch.tensor([[1, 2, 3, 4], [1, 2, 3, 0]]),
        torch.tensor([[-1, 0, 1, 2], [-1, 0, 1, -1]]),
    )
    counts = torch.tensor([4, 3])
    single = TokenTree(tokens, parents, counts, torch.tensor([[1, 2, 3], [1, 2, -1]]), torch.full((2, 3), IID), laws)
    assert single.spec.is_chain
    # Row 1 has room for a second draw of its last node, although no row has more draws than there are nodes.
    double = replace(single, draws_BM=torch.tensor([[1, 2, 3], [1, 2, 2]]))
    assert not double.spec.is_chain


def _siblings(kinds: list[DrawKind], law: list[float], **extra: Any) -> TokenTree:
    """A root with children 1 and 2, drawn as `kinds` from one law over four tokens."""
    laws = torch.zeros(1, 3, 4)
    laws[0, 0] = torch.tensor(law)
    tokens, parents = torch.tensor([[0, 1, 2]]), torch.tensor([[-1, 0, 0]])
    return TokenTree(tokens, parents, torch.tensor([3]), torch.tensor([[1, 2]]), torch.tensor([kinds]), laws, **extra)


def test_specs_name_the_kinds_that_occur() -> None:
    assert _siblings([IID, FIXED], [0.5, 0.5, 0, 0]).spec.kinds == {IID, FIXED}
    assert _siblings([WITHOUT, WITHOUT], [0, 0.5, 0.5, 0]).spec.kinds == {WITHOUT}
    # A padding draw's kind is no kind of the tree.
    padded = TokenTree(**_fields(kinds_BM=torch.tensor([[IID] * 4, [IID, IID, WITHOUT, FIXED]])))
    assert padded.spec.kinds == {IID}


def test_siblings_that_no_rule_has_a_meaning_for_are_refused() -> None:
    with pytest.raises(ValueError, match=r"children of node 0 are drawn both i\.i\.d\. and without replacement"):
        _siblings([IID, WITHOUT], [0, 0.5, 0.5, 0])
    with pytest.raises(ValueError, match="law of node 0 has mass on token 2, its FIXED child"):
        _siblings([IID, FIXED], [0, 0.5, 0.5, 0])
    with pytest.raises(ValueError, match="vocab_size=9 differs from the 4 tokens"):
        _siblings([IID, IID], [0, 0.5, 0.5, 0], vocab_size=9)


def test_the_quick_look_passes_no_tree_that_has_a_fault() -> None:
    """Trees with one entry changed at random: whichever has a fault is refused, and most of the sound ones need one look."""
    chance, num_faults, num_quick = random.Random(0), 0, 0
    for _ in range(600):
        sizes = [chance.randint(1, 5) for _ in range(2)]
        rows = [([chance.randrange(VOCAB)], [-1]) for _ in sizes]
        for (tokens, parents), size in zip(rows, sizes, strict=True):
            while len(tokens) < size:
                token, parent = chance.randrange(VOCAB), chance.randrange(len(tokens))
                if (token, parent) not in zip(tokens, parents, strict=True):
                    tokens.append(token)
                    parents.append(parent)
        tree = TokenTree.from_lists(rows, VOCAB)
        names = ["tokens_BN", "parents_BN", "num_nodes_B", *(["draws_BM", "kinds_BM"] if tree.max_nodes > 1 else [])]
        for name in names:
            values = getattr(tree, name).clone()
            at = tuple(chance.randrange(size) for size in values.shape)
            values[at] = chance.randint(-2, VOCAB)
            changed = object.__new__(TokenTree)
            changed.__dict__.update(tree.__dict__ | {name: values})
            # What was derived is that of the tree before.
            changed.__dict__.pop("is_node_BN", None)
            try:
                tree_checks._find_fault(changed)
            except ValueError:
                num_faults += 1
                assert not tree_checks._is_plainly_right(changed), (name, at, values)
            else:
                num_quick += tree_checks._is_plainly_right(changed)
    assert num_faults > 600 and num_quick > 300
