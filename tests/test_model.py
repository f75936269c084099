"""PagedModel against plain transformers: every node of random trees in random packed forwards, and who is refused."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field

import pytest
import torch
from conftest import VOCAB_SIZE, make_tiny
from torch import Tensor

from specdec.attention import UnsupportedModelError
from specdec.kv_cache import KVCache
from specdec.model import PagedModel, Segment
from specdec.pages import PagePool, PageTable
from specdec.tree import TokenTree

MOE = {"num_experts_per_tok": 2}
ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 6},
    "gemma2": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "num_hidden_layers": 6},
    "phi3": {},
    "olmo2": {},
    "gpt_neox": {},
    "gpt2": {"n_positions": 128},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "mixtral": {"num_local_experts": 4, **MOE},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16, **MOE},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "sliding_window": 6, **MOE},
}


@dataclass
class Row:
    """A sequence of the scenario: its tokens, and how many of them have keys and values."""

    table: PageTable
    tokens: list[int]
    num_computed: int = 0


@dataclass
class Scenario:
    """Random packed forwards over three sequences; `paths[i]` are the tokens behind row i of `logits`."""

    model: PagedModel
    draw: random.Random
    prompt_lens: tuple[int, ...] = (8, 14)
    max_chunk: int = 6
    paths: list[tuple[int, ...]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    num_commits: int = 0
    num_mixed: int = 0

    def run(self, rounds: int) -> None:
        pool = PagePool(300, page_size=4)
        cache = self.model.new_cache(pool)
        poison(cache, range(pool.num_pages * 4))
        self.rows = [
            Row(PageTable(pool), self.new_tokens(count)) for count in (*self.prompt_lens, self.draw.randrange(20, 35))
        ]
        for _ in range(rounds):
            self.one_round(cache)
        assert any(row.table.first_slot is None for row in self.rows)
        pool.check(row.table for row in self.rows)

    def new_tokens(self, count: int) -> list[int]:
        return [self.draw.randrange(3, VOCAB_SIZE) for _ in range(count)]

    def one_round(self, cache: KVCache) -> None:
        chosen = self.draw.sample(self.rows, self.draw.randrange(1, 4))
        parts = [self.tree(row) if row.num_computed == len(row.tokens) - 1 else self.chunk(row) for row in chosen]
        segments = [segment for segment, _, _ in parts]
        paths = [path for _, part_paths, _ in parts for path in part_paths]
        wanted = sorted(self.draw.sample(range(len(paths)), self.draw.randrange(1, len(paths) + 1)))
        result = self.model.forward(segments, cache, torch.tensor(wanted))
        self.paths += [paths[row] for row in wanted]
        self.logits.append(result.logits_RV)
        trees = [tree for _, _, tree in parts]
        self.num_mixed += any(tree is None for tree in trees) and any(tree is not None for tree in trees)
        for row, tree in zip(chosen, trees, strict=True):
            if tree is not None:
                self.commit(row, tree, cache)

    def chunk(self, row: Row) -> tuple[Segment, list[tuple[int, ...]], None]:
        start = row.num_computed
        stop = self.draw.randrange(start + 1, min(start + 1 + self.max_chunk, len(row.tokens)))
        row.table.reserve(stop, start)
        row.num_computed = stop
        paths = [tuple(row.tokens[: i + 1]) for i in range(start, stop)]
        return Segment(row.table, start, torch.tensor(row.tokens[start:stop]), torch.arange(start, stop)), paths, None

    def tree(self, row: Row) -> tuple[Segment, list[tuple[int, ...]], TokenTree]:
        start, nodes = row.num_computed, self.draw.randrange(1, 10)
        parents = [-1, *(self.draw.randrange(node) for node in range(1, nodes))]
        tokens = [row.tokens[-1], *self.draw.sample(range(3, VOCAB_SIZE), nodes - 1)]
        tree = TokenTree.from_parents(torch.tensor([tokens]), torch.tensor([parents]))
        row.table.reserve(start + nodes, start)
        before = row.tokens[:-1]
        paths = [(*before, *(tokens[at] for at in tree.path(node))) for node in range(nodes)]
        positions = start + tree.depth_BN[0]
        return Segment(row.table, start, tree.tokens_BN[0], positions, tree.ancestors_BNN[0]), paths, tree

    def commit(self, row: Row, tree: TokenTree, cache: KVCache) -> None:
        """Accepts the path to a random node; what it leaves behind turns to NaN, so that nobody reads it again."""
        path, start = tree.path(self.draw.randrange(tree.max_nodes)), row.num_computed
        slots = [row.table.slot(start + node) for node in range(tree.max_nodes)]
        cache.move([slots[node] for node in path], slots[: len(path)])
        poison(cache, slots[len(path) :])
        row.tokens += [*tree.tokens_BN[0, path[1:]].tolist(), *self.new_tokens(1)]
        row.num_computed += len(path)
        self.num_commits += len(path) > 1


def poison(cache: KVCache, slots: range | list[int]) -> None:
    for layer in range(len(cache.shapes)):
        for tensor in cache.layer(layer):
            tensor[list(slots)] = torch.nan


@torch.no_grad()
def plain_logits(reference: torch.nn.Module, paths: list[tuple[int, ...]]) -> Tensor:
    """The logits behind each path, from transformers' own forward over that path."""
    found: dict[tuple[int, ...], Tensor] = {}
    for path in sorted(set(paths), key=len, reverse=True):
        if path not in found:
            rows = reference(input_ids=torch.tensor([path]), use_cache=False).logits[0]
            found |= {path[: i + 1]: row for i, row in enumerate(rows) if path[: i + 1] not in found}
    return torch.stack([found[path] for path in paths])


def make_pair(architecture: str, seed: int = 0, **overrides: object) -> tuple[PagedModel, torch.nn.Module]:
    """The model over pages, and its twin as transformers runs it."""
    options = {"num_hidden_layers": 3} | ARCHITECTURES.get(architecture, {}) | overrides
    model = make_tiny(seed, architecture=architecture, **options)
    # Logits of order one, which is what the default absolute tolerance is made for; Gemma adds one to its norms' weights.
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.5)
        for parameter in model.parameters():
            if parameter.ndim == 1 and architecture.startswith("gemma"):
                parameter.sub_(1)
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    return PagedModel(model), reference


def assert_parity(model: PagedModel, reference: torch.nn.Module, seed: int, rounds: int = 14) -> None:
    scenario = Scenario(model, random.Random(seed))
    scenario.run(rounds)
    assert scenario.num_commits > 1
    assert scenario.num_mixed > 1
    torch.testing.assert_close(torch.cat(scenario.logits), plain_logits(reference, scenario.paths))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_node_has_the_logits_of_its_own_path(architecture):
    assert_parity(*make_pair(architecture), seed=1)


@pytest.mark.parametrize("seed", range(2, 6))
def test_more_random_scenarios(seed):
    assert_parity(*make_pair("mistral", seed), seed, rounds=25)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads(kv_heads):
    assert_parity(*make_pair("llama", num_key_value_heads=kv_heads), seed=6)


def test_a_tree_computed_piece_by_piece():
    """As a draft model grows it: the new nodes see earlier ones that are in the cache already."""
    model, reference = make_pair("mistral")
    pool = PagePool(30, page_size=4)
    cache, table, between = model.new_cache(pool), PageTable(pool), PageTable(pool)
    table.reserve(5, 0)
    between.reserve(1, 0)
    table.reserve(30, 0)
    poison(cache, range(120))
    draw = random.Random(0)
    prompt = draw.sample(range(3, VOCAB_SIZE), 9)
    tokens = torch.tensor([draw.sample(range(3, VOCAB_SIZE), 8)])
    tree = TokenTree.from_parents(tokens, torch.tensor([[-1, 0, 0, 1, 1, 2, 4, 5]]))
    model.forward([Segment(table, 0, torch.tensor(prompt), torch.arange(9))], cache)
    positions = 9 + tree.depth_BN[0]
    for start, stop in ((0, 1), (1, 3), (3, 6), (6, 8)):
        mask = tree.ancestors_BNN[0, start:stop, :stop]
        segment = Segment(table, 9, tokens[0, start:stop], positions[start:stop], mask, positions[:stop])
        found = model.forward([segment], cache).logits_RV
        paths = [(*prompt, *tokens[0, tree.path(node)].tolist()) for node in range(start, stop)]
        torch.testing.assert_close(found, plain_logits(reference, paths))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "opt", "gpt_oss"])
def test_hidden_states_are_those_of_transformers(architecture):
    model, reference = make_pair(architecture)
    pool = PagePool(10, page_size=4)
    cache, table = model.new_cache(pool), PageTable(pool)
    table.reserve(11, 0)
    tokens = torch.arange(20, 31)
    layers = range(model.num_layers + 1)
    found = [
        model.forward(
            [Segment(table, start, tokens[start:stop], torch.arange(start, stop))], cache, None, layers
        ).hidden
        for start, stop in ((0, 4), (4, 11))
    ]
    with torch.no_grad():
        wanted = reference(input_ids=tokens[None], output_hidden_states=True).hidden_states
    assert len(wanted) == len(layers)
    for layer in layers:
        torch.testing.assert_close(torch.cat([part[layer] for part in found]), wanted[layer][0])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_wanted_rows_pick_and_order_the_logits(architecture):
    model, _ = make_pair(architecture)
    pool = PagePool(10, page_size=4)
    cache, table = model.new_cache(pool), PageTable(pool)
    table.reserve(6, 0)
    segment = Segment(table, 0, torch.arange(5, 11), torch.arange(6))
    all_rows = model.forward([segment], cache, hidden_layers=(1,))
    some = model.forward([segment], cache, torch.tensor([4, 1]), hidden_layers=(1,))
    torch.testing.assert_close(some.logits_RV, all_rows.logits_RV[[4, 1]])
    torch.testing.assert_close(some.hidden[1], all_rows.hidden[1])
    assert model.vocab_size == VOCAB_SIZE == all_rows.logits_RV.shape[-1]


REFUSED = {
    "bloom": ({}, "do not use the attention function registered"),
    "falcon": ({}, "do not use the attention function registered"),
    "mpt": ({}, "do not use the attention function registered"),
    "stablelm": ({}, "does not hand the keyword tree_context down"),
    "mamba": ({}, "do not use the attention function registered"),
    "qwen3_next": (
        {"num_experts": 4, "moe_intermediate_size": 16, "num_hidden_layers": 4, **MOE},
        "layers .0, 1, 2. of",
    ),
}


@pytest.mark.parametrize("architecture", REFUSED)
def test_a_model_with_other_attention_is_refused(architecture):
    options, reason = REFUSED[architecture]
    with pytest.raises(UnsupportedModelError, match=reason):
        PagedModel(make_tiny(architecture=architecture, **({"num_hidden_layers": 2} | options)))


def test_long_rope_ends_where_it_would_change_its_frequencies():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    lengths = {"original_max_position_embeddings": 64, "max_position_embeddings": 128}
    model, reference = make_pair("phi3", rope_parameters=rope, **lengths)
    assert model.max_positions == 64
    assert_parity(model, reference, seed=7)
    assert make_pair("phi3")[0].max_positions == 256
