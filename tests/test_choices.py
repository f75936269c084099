"""Static trees from measured accuracies: the best tree of a size, and rates that are those of a dense forward."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch
from head_cases import eagle_config, hidden_states, learn_eagle, learn_medusa

from specdec import Engine, PagedModel, SamplingParams
from specdec.drafters import EagleDrafter, MedusaDrafter, SmallModelDrafter, Static
from specdec.drafters.accuracies import RankAccuracies, measure_accuracies
from specdec.drafters.choices import best_choices, expected_length, static
from specdec.verifiers import Verifier

TEXTS = [[3, 4, 5, 6, 3, 4, 5, 6, 3, 4, 5, 6], [9, 8, 7, 9, 8, 7, 9], [5, 5], [11, 12, 13]]


def value(accuracies: list[list[float]], tree: tuple[tuple[int, ...], ...]) -> float:
    return sum(math.prod(accuracies[depth][rank] for depth, rank in enumerate(path)) for path in tree)


@pytest.mark.parametrize("seed", range(4))
def test_no_tree_of_the_size_is_better(seed: int) -> None:
    rng = random.Random(seed)
    accuracies = []
    for _ in range(3):
        rates = [rng.random() for _ in range(3)]
        accuracies.append([rate / sum(rates) * rng.choice((0.4, 0.8, 1.0)) for rate in rates[:2]])
    paths = [path for depth in (1, 2, 3) for path in itertools.product(range(2), repeat=depth)]
    for total in (2, 3, 5, 7):
        trees = [
            tree for tree in itertools.combinations(paths, total - 1) if all(path[:-1] in {(), *tree} for path in tree)
        ]
        found = best_choices(accuracies, total)
        assert len(found) == total - 1 and Static(found).max_nodes == total
        assert expected_length(accuracies, found) == pytest.approx(max(value(accuracies, tree) for tree in trees))


def test_guesses_that_are_never_right_get_no_node() -> None:
    assert best_choices([[0.5, 0.0], [0.0, 0.25]], 64) == [[0], [0, 1]]
    assert best_choices([[0.5, 0.31], [0.6]], 3) == [[0], [1]]
    assert best_choices([[0.5, 0.29], [0.6]], 3) == [[0], [0, 0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: best_choices([], 4), "accuracies is empty"),
        (lambda: best_choices([[0.5], []], 4), "accuracies is empty"),
        (lambda: best_choices([[0.5, 0.6]], 4), r"accuracies\[0\]"),
        (lambda: best_choices([[0.5], [-0.1]], 4), r"accuracies\[1\]"),
        (lambda: best_choices([[0.5]], 1), "total=1"),
        (lambda: best_choices([[0.0]], 4), "no node besides the root"),
        (lambda: expected_length([[0.5]], [[0], [0, 0]]), "depth 2"),
        (lambda: expected_length([[0.5]], [[1]]), "rank 1"),
    ],
)
def test_bad_accuracies_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture(scope="module")
def target(tiny) -> PagedModel:
    return PagedModel(tiny(0), name="target")


@torch.no_grad()
def test_medusa_rates_are_those_of_the_heads(target) -> None:
    drafter = MedusaDrafter(learn_medusa(target, [text for text in TEXTS if len(text) > 4], num_heads=2, steps=8))
    found = measure_accuracies(drafter, target, TEXTS, depth=3, num_ranks=4)
    hits, counts = [[0] * 4 for _ in range(3)], [0] * 3
    for text in TEXTS:
        logits = drafter.heads.logits(hidden_states(target, text)[-1])
        for head in range(2):
            for at in range(len(text) - head - 2):
                ranks = logits[head, at].argsort(descending=True)[:4].tolist()
                counts[head] += 1
                for rank, token in enumerate(ranks):
                    hits[head][rank] += token == text[at + head + 2]
    assert found == RankAccuracies(hits, counts)
    # There is no third head, so there is nothing to say about it.
    assert len(found.rates) == 2 and sum(found.rates[0]) > 0.5
    assert Static(best_choices(found.rates, 6)).max_nodes <= 6


@torch.no_grad()
def test_eagle_rates_are_those_of_its_guesses(target) -> None:
    texts = [text for text in TEXTS if len(text) > 4]
    drafter = EagleDrafter(learn_eagle(target, eagle_config(target, 3, draft_vocab_size=12), texts, steps=12))
    one, two = (measure_accuracies(drafter, target, [text], 2, 12) for text in texts)
    assert measure_accuracies(drafter, target, texts, 2, 12) == one + two
    # Among all tokens that the head knows, every one of these texts is found.
    assert [sum(hits) for hits in (one + two).hits] == (one + two).counts == [15, 13]
    assert one.rates[0][0] > 0.5
    assert measure_accuracies(drafter, target, texts, 2, 12, stride=3).counts == [6, 5]


def test_a_model_that_drafts_itself_is_always_right(tiny, target) -> None:
    (result,) = Engine(Verifier(target)).generate([[5, 6, 7]], SamplingParams(max_new_tokens=12, ignore_eos=True))
    text = [5, 6, 7, *result.token_ids]
    found = measure_accuracies(SmallModelDrafter(PagedModel(tiny(0))), target, [text], depth=3, num_ranks=2)
    # The prompt's own second and third token are not the model's.
    assert [count - hits[0] for count, hits in zip(found.counts, found.hits, strict=True)] in ([1, 0, 0], [0, 0, 0])
    assert found.counts == [13, 12, 11]


@pytest.mark.parametrize("numbers", [{"depth": 0}, {"num_ranks": 0}, {"stride": 0}])
def test_numbers_below_one_are_refused(target, numbers: dict[str, int]) -> None:
    drafter = SmallModelDrafter(target)
    with pytest.raises(ValueError, match=f"{next(iter(numbers))}=0"):
        measure_accuracies(drafter, target, TEXTS, **({"depth": 1, "num_ranks": 1} | numbers))
    with pytest.raises(ValueError, match="no text has three tokens"):
        measure_accuracies(drafter, target, [[1, 2]], 1, 1)


def test_roots_may_begin_behind_a_prompt(target) -> None:
    drafter = SmallModelDrafter(target)
    text = TEXTS[0]
    found = measure_accuracies(drafter, target, [text, TEXTS[1]], 2, 3, first_roots=[8, 5])
    # Roots 8..10 of twelve tokens and root 5 of seven.
    assert found.counts == [4, 2]
    whole = measure_accuracies(drafter, target, [text], 2, 3)
    front = measure_accuracies(drafter, target, [text[:9]], 2, 3)
    last = measure_accuracies(drafter, target, [text], 1, 3, first_roots=[8])
    assert [a - b for a, b in zip(whole.hits[0], front.hits[0], strict=True)] == last.hits[0]


def test_a_static_tree_comes_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "static-4.json"
    file.write_text(json.dumps({"choices": [[0], [1], [0, 0]], "total": 4}))
    assert static(str(file))._levels == static([[0], [1], [0, 0]])._levels
    for content in ("{", "{}", "[]", '{"choices": 3}', '{"choices": [["a"]]}'):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"static-4.json: no JSON file with a list of rank paths"):
            static(str(file))
    with pytest.raises(ValueError, match=r"no JSON file .*FileNotFoundError"):
        static(str(tmp_path / "nowhere.json"))
