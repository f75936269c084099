"""The C++ kernels for CPUs: products and whole stacks of layers against transformers, and bits that company does
not change."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import make_tiny
from cpu_targets import kernels as kernels
from test_tree_attention import INVARIANT, make_case, naive_attention
from torch.nn.functional import linear

from specdec.decoder import FastDecoder, NotServed
from specdec.decoder_check import check_decoder
from specdec.drafters.growth import TopK
from specdec.drafters.ngram import NGramDrafter
from specdec.drafters.small_model import SmallModelDrafter
from specdec.engine import Engine
from specdec.kernels.cpu import BlockedWeight, DecoderStack, NotBuilt, build, can_run, library, path_attention
from specdec.kernels.cpu.stack import last_queries
from specdec.kernels.linear import Arena
from specdec.kernels.tree_attention import SequencePlan
from specdec.model import PagedModel, Segment
from specdec.pages import PagePool, PageTable
from specdec.sampling import SamplingParams
from specdec.tree import TokenTree
from specdec.verifiers import Verifier

pytestmark = pytest.mark.usefixtures("kernels")

SIZES = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
MODELS = {
    "llama": ("llama", SIZES),
    "llama with biases": ("llama", SIZES | {"attention_bias": True, "mlp_bias": True}),
    "no groups, wide heads": ("llama", SIZES | {"num_key_value_heads": 6, "head_dim": 96}),
    "one group, wider heads": ("llama", SIZES | {"num_key_value_heads": 1, "head_dim": 128}),
    "tied": ("llama", SIZES | {"tie_word_embeddings": True}),
    "scaled rotary": (
        "llama",
        SIZES | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    ),
    "qwen2": ("qwen2", SIZES | {"hidden_size": 192}),
    "qwen3": ("qwen3", SIZES | {"head_dim": 64}),
    "mistral with a window": ("mistral", SIZES | {"sliding_window": 21}),
    "a window on some layers": (
        "qwen3",
        SIZES
        | {"use_sliding_window": True, "sliding_window": 17, "layer_types": ["full_attention", "sliding_attention"]},
    ),
}


def fused(name: str, int8: bool = False) -> tuple[PagedModel, PagedModel]:
    """A model that runs in one call, and the same weights in float32."""
    architecture, settings = MODELS[name]
    exact = make_tiny(architecture=architecture, **settings)
    # Numbers that bfloat16 has, so both models are the same.
    exact.load_state_dict({key: value.bfloat16().float() for key, value in exact.state_dict().items()})
    quick = make_tiny(architecture=architecture, **settings)
    quick.load_state_dict(exact.state_dict())
    model = PagedModel(quick.bfloat16())
    model.pack(int8)
    return model, PagedModel(exact)


PARENTS = [-1, 0, 0, 1, 2, 2, 3, 5, 6, 7, 9]


def logits(model: PagedModel, scattered: bool = False) -> torch.Tensor:
    """A prompt in pieces, then a tree behind it beside another sequence's prompt."""
    ids = torch.randint(3, 90, (140,), generator=torch.Generator().manual_seed(3))
    pool = PagePool(num_pages=40, page_size=16)
    cache = model.new_cache(pool)
    table, other = PageTable(pool), PageTable(pool)
    if scattered:
        for pages in range(1, 7):
            table.reserve(16 * pages, 0)
            other.reserve(16 * pages, 0)
    table.reserve(120, 0)
    other.reserve(40, 0)
    found, start = [], 0
    for size in (41, 1, 35, 18):
        chunk = Segment(table, start, ids[start : start + size], torch.arange(start, start + size))
        found.append(model.forward([chunk], cache).logits_RV)
        start += size
    tree = TokenTree.from_parents(ids[None, start : start + len(PARENTS)], torch.tensor([PARENTS]))
    branch = Segment(table, start, tree.tokens_BN[0], start + tree.depth_BN[0], tree.ancestors_BNN[0])
    found.append(model.forward([Segment(other, 0, ids[20:49], torch.arange(29)), branch], cache).logits_RV)
    return torch.cat(found).float()


@pytest.mark.parametrize("name", MODELS)
def test_a_stack_rounds_no_worse_than_transformers(name: str) -> None:
    model, exact = fused(name)
    assert model.is_fused
    wanted, quick = logits(exact), logits(model)
    with model.layer_by_layer():
        slow = logits(model)
    spread = wanted.std()
    error, theirs = float((quick - wanted).abs().mean() / spread), float((slow - wanted).abs().mean() / spread)
    assert error < 1.2 * theirs + 1e-3
    assert float((quick - wanted).abs().max() / spread) < 2 * float((slow - wanted).abs().max() / spread)
    assert torch.equal(logits(model, scattered=True), quick)


@pytest.mark.parametrize("name", MODELS)
def test_a_token_has_the_bits_it_has_alone(name: str) -> None:
    model, _ = fused(name)
    ids = torch.randint(3, 90, (100,), generator=torch.Generator().manual_seed(4))
    pool = PagePool(num_pages=60, page_size=16)
    cache = model.new_cache(pool)
    one_by_one, at_once, branched, forked = (PageTable(pool) for _ in range(4))
    for table in (one_by_one, at_once, branched, forked):
        table.reserve(120, 0)
    alone = torch.cat(
        [
            model.forward([Segment(one_by_one, i, ids[i : i + 1], torch.tensor([i]))], cache).logits_RV
            for i in range(100)
        ]
    )
    assert torch.equal(model.forward([Segment(at_once, 0, ids, torch.arange(100))], cache).logits_RV, alone)
    model.forward([Segment(branched, 0, ids[:90], torch.arange(90))], cache)
    path = [0, 1, 3, 6, 8]
    nodes = 7 + torch.arange(len(PARENTS))[None]
    nodes[0, path] = ids[90:95]
    tree = TokenTree.from_parents(nodes, torch.tensor([PARENTS]))
    branch = Segment(branched, 90, nodes[0], 90 + tree.depth_BN[0], tree.ancestors_BNN[0])
    found = model.forward([branch], cache).logits_RV
    assert torch.equal(found[path], alone[90:95])
    # A tree so small that its rows are few beside what a vector holds, behind an odd number of tokens.
    model.forward([Segment(forked, 0, ids[:91], torch.arange(91))], cache)
    small = TokenTree.from_parents(torch.tensor([[int(ids[91]), 7, int(ids[92])]]), torch.tensor([[-1, 0, 0]]))
    fork = Segment(forked, 91, small.tokens_BN[0], 91 + small.depth_BN[0], small.ancestors_BNN[0])
    assert torch.equal(model.forward([fork], cache).logits_RV[[0, 2]], alone[91:93])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prompt_rows", [[28], [], [27, 28], [28, 3], [5]], ids=str)
def test_rows_that_nobody_asks_for_change_no_others(name: str, prompt_rows: list[int]) -> None:
    """A prompt, of which some rows are asked for, beside a tree, of which all are; then what was left in the cache."""
    model, _ = fused(name)
    ids = torch.randint(3, 90, (60,), generator=torch.Generator().manual_seed(5))
    rows = [*prompt_rows, *range(29, 29 + len(PARENTS))]
    found = []
    for wanted in (None, torch.tensor(rows)):
        pool = PagePool(num_pages=20, page_size=16)
        cache = model.new_cache(pool)
        table, other = PageTable(pool), PageTable(pool)
        table.reserve(60, 0)
        other.reserve(60, 0)
        model.forward([Segment(table, 0, ids[:20], torch.arange(20))], cache, torch.tensor([], dtype=torch.int64))
        tree = TokenTree.from_parents(ids[None, 20 : 20 + len(PARENTS)], torch.tensor([PARENTS]))
        branch = Segment(table, 20, tree.tokens_BN[0], 20 + tree.depth_BN[0], tree.ancestors_BNN[0])
        prompt = Segment(other, 0, ids[20:49], torch.arange(29))
        result = model.forward([prompt, branch], cache, wanted, [0, 1])
        logits_RV = result.logits_RV if wanted is not None else result.logits_RV[rows]
        kept = [
            states
            for layer in range(model.num_layers)
            for one in (table, other)
            for states in cache.gather(layer, one, 29)
        ]
        found.append([logits_RV, result.hidden[0], result.hidden[1], *kept])
    for one, other_ in zip(*found, strict=True):
        assert torch.equal(one, other_)


def test_only_ends_of_sequences_are_cut_out() -> None:
    def part(row: int, size: int, has_mask: bool = False) -> SequencePlan:
        mask = torch.ones(size, size, dtype=torch.bool).tril() if has_mask else None
        return SequencePlan(row, size, 7, mask, torch.arange(7, 7 + size), 0, None)

    sequences = [part(0, 4), part(4, 1), part(5, 3, has_mask=True), part(8, 5)]
    cut = last_queries(sequences, torch.tensor([12, 4, 5, 6, 7, 11]))
    assert cut is not None
    assert cut.rows_W.tolist() == [4, 5, 6, 7, 11, 12] and cut.order_R.tolist() == [5, 0, 1, 2, 3, 4]
    assert [(one.row, one.num_queries, one.num_keys) for one in cut.sequences] == [(4, 1, 8), (5, 3, 10), (11, 2, 12)]
    for rows in ([*range(13)], [11], [6, 7], [4, 4], [0, 1, 2]):
        assert last_queries(sequences, torch.tensor(rows)) is None


def test_hidden_states_are_transformers_own() -> None:
    model, exact = fused("llama")
    ids = torch.arange(5, 45)
    exact.model.set_attn_implementation("sdpa")
    wanted = exact.model(input_ids=ids[None], use_cache=False, output_hidden_states=True)
    pool = PagePool(num_pages=8, page_size=16)
    table = PageTable(pool)
    table.reserve(40, 0)
    cache = model.new_cache(pool)
    found = model.forward([Segment(table, 0, ids, torch.arange(40))], cache, torch.tensor([3]), [0, 1, 2])
    assert found.logits_RV.shape == (1, model.vocab_size)
    for layer in range(3):
        states = wanted.hidden_states[layer][0]
        assert float((found.hidden[layer].float() - states).abs().mean() / states.std()) < 0.05


def test_slots_that_nobody_wrote_are_not_read() -> None:
    model, _ = fused("llama")
    wanted = logits(model)
    fresh = model.new_cache

    def poisoned(pool: PagePool):
        cache = fresh(pool)
        for layer in range(model.num_layers):
            for states in cache.layer(layer):
                states.fill_(torch.nan)
        return cache

    model.new_cache = poisoned  # type: ignore[method-assign]
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_speculation_says_what_plain_decoding_says(threads: int) -> None:
    model, _ = fused("llama")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        prompts = [[5, 6, 7] * 9, [8, 9] * 30]
        params = SamplingParams(max_new_tokens=40, ignore_eos=True, temperature=0.8, seed=1)
        plain = Engine(Verifier(model)).generate(prompts, params)
        drafted = Engine(Verifier(model), NGramDrafter(), TopK(total=8, depth=4, k=2)).generate(prompts, params)
    finally:
        torch.set_num_threads(before)
    assert [one.token_ids for one in plain] == [one.token_ids for one in drafted]
    assert sum(one.metrics.num_target_forwards for one in drafted) < sum(
        one.metrics.num_target_forwards for one in plain
    )


@pytest.mark.parametrize(
    ("outputs", "inputs", "has_bias"),
    [(16, 32, False), (50, 96, True), (7, 64, True), (160, 576, False), (33, 41, True)],
)
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32, 33, 70])
def test_products_are_those_of_float32(outputs: int, inputs: int, has_bias: bool, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight, x = (torch.randn(size, inputs, generator=generator).bfloat16() for size in (outputs, rows))
    bias = torch.randn(outputs, generator=generator).bfloat16() if has_bias else None
    packed = BlockedWeight(
        weight, bias, Arena(BlockedWeight.room_for(outputs, inputs)).take(BlockedWeight.room_for(outputs, inputs))
    )
    assert torch.equal(packed.plain(), weight)
    found = packed.multiply(x)
    wanted = linear(x.double(), weight.double(), None if bias is None else bias.double())
    # A sum in float32, rounded to bfloat16 once.
    torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=1e-4 * inputs**0.5)
    for row in range(rows):
        assert torch.equal(packed.multiply(x[row : row + 1])[0], found[row])
    assert torch.equal(packed.multiply(x[None]), found[None])


@pytest.mark.parametrize(
    ("outputs", "inputs", "has_bias"), [(16, 32, False), (50, 96, True), (160, 576, False), (33, 41, True)]
)
@pytest.mark.parametrize("rows", [1, 5, 16, 33, 70])
def test_products_of_rounded_weights_are_those_of_float32(outputs: int, inputs: int, has_bias: bool, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight, x = (torch.randn(size, inputs, generator=generator).bfloat16() for size in (outputs, rows))
    # Outputs of very different size, and one of zeros alone.
    weight *= torch.logspace(-3, 2, outputs)[:, None].bfloat16()
    weight[outputs // 2] = 0
    bias = torch.randn(outputs, generator=generator).bfloat16() if has_bias else None
    room = BlockedWeight.room_for(outputs, inputs, int8=True)
    assert 2 * room == BlockedWeight.room_for(outputs, inputs)
    packed = BlockedWeight(weight, bias, Arena(room).take(room), int8=True)
    scales_O = torch.where(weight.abs().amax(1) > 0, weight.abs().amax(1).double() / 127, 1.0)
    rounded = (packed.plain().double() / scales_O[:, None]).round() * scales_O[:, None]
    torch.testing.assert_close(packed.plain().double(), rounded, rtol=2**-8, atol=0)
    # As near as whole numbers come.
    assert bool(((rounded - weight.double()).abs() <= 0.5001 * scales_O[:, None]).all())
    found = packed.multiply(x)
    wanted = linear(x.double(), rounded, None if bias is None else bias.double())
    error_RO = (found.double() - wanted).abs()
    assert bool((error_RO <= 2**-8 * wanted.abs() + 1e-4 * inputs**0.5 * scales_O * 127).all())
    for row in range(rows):
        assert torch.equal(packed.multiply(x[row : row + 1])[0], found[row])


def test_a_rounded_model_is_close_and_no_target() -> None:
    model, _ = fused("llama with biases")
    wanted = logits(model)
    rough, _ = fused("llama with biases", int8=True)
    assert rough.is_fused and rough.is_rounded and not model.is_rounded
    found = logits(rough)
    error = float((found - wanted).abs().mean() / wanted.std())
    assert 1e-3 < error < 0.1
    with pytest.raises(ValueError, match="int8=True, which is for draft models"):
        Verifier(rough)
    params = SamplingParams(max_new_tokens=20, ignore_eos=True, temperature=0.8, seed=1)
    engine = Engine(Verifier(model), SmallModelDrafter(rough), TopK(total=8, depth=4, k=2))
    drafted = engine.generate([[5, 6, 7] * 9, [8, 9] * 30], params)
    plain = Engine(Verifier(model)).generate([[5, 6, 7] * 9, [8, 9] * 30], params)
    assert [one.token_ids for one in drafted] == [one.token_ids for one in plain]
    # Nearly the target itself: most of what it drafts stays.
    assert sum(one.metrics.num_target_forwards for one in drafted) < 0.6 * sum(
        one.metrics.num_target_forwards for one in plain
    )


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"window": 3, "sinks_H": torch.linspace(-2, 3, 6)}], ids=str)
@pytest.mark.parametrize("shape", [(6, 2, 16, 16), (6, 6, 24, 24), (6, 1, 64, 64), (6, 3, 44, 44)])
def test_attention_is_that_of_float32(shape: tuple[int, ...], options: dict) -> None:
    case = make_case(shape, INVARIANT, False, torch.bfloat16, seed=6)
    chosen = {"window": None, "sinks_H": None} | options
    found = path_attention(case.query_THE, case.keys_SGE, case.values_SGE, case.plan.sequences, 0.25, **chosen)
    wanted = naive_attention(case, 0.25, **options)
    torch.testing.assert_close(found.double(), wanted.double(), rtol=2**-7, atol=2**-7)


def test_an_arena_hands_out_what_it_has() -> None:
    arena = Arena(64)
    assert arena.take(48).data_ptr() + 96 == arena.take(16).data_ptr()
    with pytest.raises(ValueError, match="1 numbers do not fit the 0"):
        arena.take(1)


@pytest.mark.parametrize(
    ("architecture", "settings", "part"),
    [
        ("gemma2", {"head_dim": 32}, "model type gemma2"),
        ("llama", {"hidden_act": "gelu"}, "activation is gelu"),
        ("llama", {"head_dim": 48}, "head size 48"),
        ("llama", {"intermediate_size": 144}, "intermediate size 144"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rotary"),
    ],
)
def test_other_models_go_the_way_of_transformers(architecture: str, settings: dict, part: str) -> None:
    model = PagedModel(make_tiny(architecture=architecture, **SIZES | settings).bfloat16())
    model.pack()
    assert not model.is_fused
    with pytest.raises(NotServed, match=part):
        FastDecoder(model.model, model.layer_options)


def test_a_stack_that_computes_something_else_is_dropped(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    # The kernels come from the usual folder, where they are built already.
    model, _ = fused("llama")
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    check_decoder(model)
    assert model.is_fused and list(tmp_path.rglob("decoder/*.json"))
    wrong = dataclasses.replace(model._decoder._stack.shape, scaling=1.0)
    model._decoder._stack = DecoderStack(wrong, model._decoder._stack.layers)
    model.model.config.name = "another"
    with pytest.warns(UserWarning, match="runs layer by layer"):
        check_decoder(model)
    assert not model.is_fused


_AVX512 = "avx2 fma avx512f avx512bw avx512dq avx512vl"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (f"GenuineIntel {_AVX512} avx512_bf16 amx_bf16", "amx"),
        (f"GenuineIntel {_AVX512} avx512_bf16", "avx512"),
        (f"AuthenticAMD {_AVX512} avx512_bf16", "avx512_bf16"),
        (f"GenuineIntel {_AVX512}", "avx512"),
        ("AuthenticAMD avx2 fma", "avx2"),
    ],
)
def test_the_fastest_instructions_are_taken(monkeypatch: pytest.MonkeyPatch, words: str, wanted: str) -> None:
    """Not the newest: a product of bfloat16 is quick on AMD's CPUs and slow on Intel's."""
    monkeypatch.setattr(build, "_cpu_words", lambda: set(words.split()))
    monkeypatch.delenv("SPECDEC_CPU", raising=False)
    assert build.instruction_set() == wanted
    if "avx512_bf16" in words:
        monkeypatch.setenv("SPECDEC_CPU", "avx512_bf16")
        assert build.instruction_set() == "avx512_bf16"
    else:
        monkeypatch.setenv("SPECDEC_CPU", "amx")
        with pytest.raises(ValueError, match=r"SPECDEC_CPU='amx' is nothing that this CPU runs; use .*avx2"):
            build.instruction_set()


def test_a_switch_forbids_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_KERNELS", "reference")
    library.cache_clear()
    try:
        with pytest.raises(NotBuilt, match="SPECDEC_KERNELS=reference"):
            library()
        model = PagedModel(make_tiny(**SIZES).bfloat16())
        model.pack()
        assert not model.is_fused
    finally:
        monkeypatch.undo()
        library.cache_clear()


def test_no_compiler_is_no_disaster(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    library.cache_clear()
    try:
        with pytest.raises(NotBuilt, match="false failed"):
            library()
        assert not can_run()
    finally:
        monkeypatch.undo()
        library.cache_clear()
