"""Drafters on their own: prompt lookup's index and trees, the small model's fit to its target."""

from __future__ import annotations

import random

import pytest
import torch

from specdec import Engine, PagedModel, SamplingParams
from specdec.drafters import NGramDrafter, Sampled, SmallModelDrafter, Static, TopK, chain
from specdec.drafters.ngram import NGramIndex
from specdec.interfaces import Commit
from specdec.noise import CounterNoise
from specdec.pages import PagePool, PageTable
from specdec.sequence import Sequence
from specdec.verifiers import Verifier


def sequence(token_ids: list[int], new: int = 50) -> Sequence:
    return Sequence(0, token_ids, SamplingParams(), 0, PageTable(PagePool(0)), len(token_ids) + new)


def propose(token_ids: list[int], policy: object, new: int = 50, **options: int):
    drafter = NGramDrafter(**options)
    drafter._vocab_size = 1000
    return drafter.propose([sequence(token_ids, new)], policy, CounterNoise([1], [0], [len(token_ids) - 1]))


def paths(tree) -> list[list[int]]:
    """Token paths of all nodes of row 0, the root left out."""
    tokens = tree.tokens_BN[0].tolist()
    return [[tokens[n] for n in tree.path(node)[1:]] for node in range(1, int(tree.num_nodes_B[0]))]


def test_index_finds_what_a_search_finds() -> None:
    rng = random.Random(0)
    tokens = [rng.randrange(4) for _ in range(300)]
    index = NGramIndex(2, 4, 1000)
    for start in range(0, 300, 7):
        index.extend(tokens[start : start + 7])
    have = index.tokens
    want: dict[int, None] = {}
    for size in (4, 3, 2):
        for place in range(len(have) - 1, size - 1, -1):
            if have[place - size : place] == have[-size:]:
                want.setdefault(place)
    assert index.matches(have) == list(want)


def test_longest_match_first_then_most_recent() -> None:
    #          1 2 3 -> 4 5          9 3 -> 6 7      2 3 -> 8        ends in 1 2 3
    tokens = [1, 2, 3, 4, 5, 20, 9, 3, 6, 7, 21, 2, 3, 8, 22, 1, 2, 3]
    assert paths(propose(tokens, chain(2), max_ngram=3)) == [[4], [4, 5]]
    tree = propose(tokens, TopK(total=8, depth=2, k=4), max_ngram=3)
    assert paths(tree) == [[4], [4, 5], [8], [8, 22], [6], [6, 7]]
    assert paths(propose(tokens, TopK(total=4, depth=2, k=4), max_ngram=3)) == [[4], [4, 5], [8]]
    assert paths(propose(tokens, Static([[0], [1], [1, 0], [2]]), max_ngram=3)) == [[4], [8], [8, 22], [6]]


def test_a_repetition_is_carried_on_past_the_end() -> None:
    assert paths(propose([7, 1, 2, 1, 2, 1, 2], chain(5), max_ngram=2))[-1] == [1, 2, 1, 2, 1]
    assert paths(propose([9, 5, 5], chain(3)))[-1] == [5, 5, 5]


def test_nothing_known_is_a_root_alone_and_limits_hold() -> None:
    assert paths(propose([1, 2, 3], chain(4))) == []
    assert paths(propose([1, 1, 1, 1], chain(4), new=3))[-1] == [1, 1]
    assert paths(propose([1, 1, 1, 1], chain(4), new=1)) == []


def test_sampled_policies_draw_from_the_frequencies() -> None:
    tokens = [1, 2, 1, 2, 1, 3, 1]
    tree = propose(tokens, Sampled([4]), min_ngram=1, max_ngram=1)
    law = torch.zeros(1000)
    law[2], law[3] = 2 / 3, 1 / 3
    torch.testing.assert_close(tree.draft_laws_BNV[0, 0], law)
    assert set(tree.tokens_BN[0, 1:].tolist()) <= {2, 3} and int((tree.draws_BM >= 0).sum()) == 4


def test_sampled_policies_look_up_ngrams_of_any_length() -> None:
    # Twelve equal tokens lie before the end; a shorter memory would match other places as well, or none at all.
    span = list(range(100, 112))
    tree = propose([*span, 7, 111, 8, *span], Sampled([2]), min_ngram=12, max_ngram=12)
    assert set(tree.tokens_BN[0, 1 : int(tree.num_nodes_B[0])].tolist()) == {7}


def test_tokens_are_indexed_once_prompts_a_chunk_behind_and_the_rest_when_asked(
    monkeypatch: pytest.MonkeyPatch, tiny
) -> None:
    read: list[int] = []
    extend = NGramIndex.extend
    monkeypatch.setattr(NGramIndex, "extend", lambda index, tokens: (read.extend(tokens), extend(index, tokens))[1])
    drafter, one = NGramDrafter(), sequence([1, 2, 3, 4])
    target = PagedModel(tiny(0))
    drafter.bind(target, PagePool(0))
    drafter.observe([Commit(0, 0, [1, 2], 3, None, {}, one)])
    assert read == []
    one.token_ids += [5, 6]
    drafter.observe([Commit(0, 2, [3, 4], 5, None, {}, one)])
    drafter.observe([Commit(0, 4, [5], 6, [0], {}, one)])
    assert read == [1, 2]
    for more in ([], [5, 1, 2], []):
        one.token_ids += more
        drafter.propose([one], chain(2), CounterNoise([1], [0], [len(one.token_ids) - 1]))
        assert read == one.token_ids == drafter._indexes[0].tokens
    # Another engine's sequence of the same number is another text.
    drafter.bind(target, PagePool(0))
    other = sequence([7, 8, 7])
    tree = drafter.propose([other], chain(2), CounterNoise([1], [0], [2]))
    assert paths(tree) == [[8], [8, 7]]
    drafter.forget([0])
    assert not drafter._indexes


@pytest.mark.parametrize("options", [{"min_ngram": 0}, {"min_ngram": 3, "max_ngram": 2}, {"max_matches": 0}])
def test_ngram_settings_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"={next(iter(options.values()))}"):
        NGramDrafter(**options)


def test_different_vocabularies_are_refused_with_both_sizes(tiny, tokenizer) -> None:
    target = PagedModel(tiny(0), name="big")
    with pytest.raises(ValueError, match=r"different vocabularies \(50 and 97 tokens\).*target's tokenizer"):
        Engine(Verifier(target), SmallModelDrafter(PagedModel(tiny(0, vocab_size=50), name="small")), chain(2))


def test_padded_logits_of_one_tokenizer_are_fitted(tiny, tokenizer) -> None:
    size = len(tokenizer)
    params = SamplingParams(temperature=1.0, seed=2, max_new_tokens=30, ignore_eos=True)
    for target_size, draft_size in [(size, size + 5), (size + 60, size)]:
        target = PagedModel(tiny(0, vocab_size=target_size), tokenizer)
        plain = Engine(Verifier(target)).generate([[40, 41, 42]], params)[0].token_ids
        # The wider target does emit ids that the draft model cannot read.
        assert (max(plain) >= size) == (target_size > size)
        draft = PagedModel(tiny(0, vocab_size=draft_size), tokenizer)
        for policy in (TopK(8, 3, 2), Sampled([2, 2])):
            engine = Engine(Verifier(target), SmallModelDrafter(draft), policy)
            assert engine.generate([[40, 41, 42]], params)[0].token_ids == plain
