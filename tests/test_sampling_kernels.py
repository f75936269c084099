"""Fused sampling, interpreted on the CPU, against the eager reference, production's own path and plain integers."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from specdec.kernels import sampling
from specdec.kernels.sampling import RowParams
from specdec.kernels.sampling.reference import invert_integers
from specdec.noise import CounterNoise, GumbelKey, PositionKey, RoundKey
from specdec.sampling import BatchSampling, SamplingParams

# Temperature, top-k, top-p, min-p: all combinations of what can be on or off.
EVERY = [
    *itertools.product((0.7,), (0, 1, 6, 400), (1.0, 0.55), (0.0, 0.08)),
    (0.0, 0, 1.0, 0.0),
    (0.0, 3, 0.2, 0.5),
    (1.6, 0, 1.0, 0.0),
    (1.6, 5, 0.9, 0.0),
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels serve, and what nobody writes holds NaN or the largest integer."""
    pytest.importorskip("triton")
    if os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("these tensors are on the CPU, where kernels only run interpreted")
    monkeypatch.setenv("SPECDEC_KERNELS", "triton")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _params(rows: list[tuple[float, int, float, float]]) -> RowParams:
    temperature, top_k, top_p, min_p = (torch.tensor(column) for column in zip(*rows, strict=True))
    return RowParams(temperature, top_k, top_p, min_p)


def _logits(rows: int, size: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def _noise(rows: int, seed: int = 5) -> CounterNoise:
    seeds = [(seed + 7919 * row) * (-1) ** row for row in range(rows)]
    return CounterNoise(seeds, range(rows), range(3, 3 + rows))


def _reference(monkeypatch: pytest.MonkeyPatch, op: str, *args: object) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setenv("SPECDEC_KERNELS", "reference")
        out: Tensor = getattr(sampling, op)(*args)
    return out


def _rows_for(size: int) -> list[tuple[float, int, float, float]]:
    return EVERY if size == 97 else EVERY[size % 3 :: 7]


@pytest.mark.parametrize("size", [1, 2, 97, 1000, 2501])
def test_laws_and_tokens_are_the_reference_s(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    rows = _rows_for(size)
    logits, params, noise = _logits(len(rows), size, size), _params(rows), _noise(len(rows))
    laws = sampling.laws(logits, params)
    wanted = _reference(monkeypatch, "laws", logits, params)
    torch.testing.assert_close(laws, wanted)
    assert torch.equal(laws > 0, wanted > 0)
    is_greedy = params.temperature_R == 0
    assert torch.equal(laws[is_greedy], wanted[is_greedy])
    for key in (PositionKey(1), GumbelKey(1), RoundKey("residual", torch.arange(len(rows)))):
        keys = noise.keys(key, torch.arange(len(rows)))
        if size == 97 and not isinstance(key, PositionKey):
            # Behind the cuts, which are the same for all keys.
            continue
        tokens = sampling.sample(logits, params, keys)
        assert torch.equal(tokens, _reference(monkeypatch, "sample", logits, params, keys))
        # From the very law that the kernel gives, up to its rounding to float32.
        assert torch.equal(tokens, _reference(monkeypatch, "draw", laws, keys))
        assert bool((wanted.gather(1, tokens[:, None]) > 0).all())


def test_tokens_are_those_of_production(monkeypatch: pytest.MonkeyPatch) -> None:
    """`probabilities` and `categorical` as the CPU runs them, with bias and penalties."""
    params = [
        SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m, repetition_penalty=1.0 + b, logit_bias={3: 2.0 * b})
        for b, (t, k, p, m) in enumerate(EVERY[::5])
    ]
    count = len(params)
    sampling_ = BatchSampling(params, [[1, 2, 5]] * count, [[5, 5, 8]] * count, 61)
    rows, paths = torch.arange(count), torch.tensor([[4, -1]] * count)
    logits, noise = _logits(count, 61), _noise(count)
    for key in (PositionKey(0), GumbelKey(0)):
        tokens = sampling_.tokens(logits, rows, paths, noise.keys(key, rows))
        ours = sampling_.probabilities(logits, rows, paths)
        with monkeypatch.context() as patch:
            patch.delenv("SPECDEC_KERNELS")
            laws = sampling_.probabilities(logits, rows, paths)
            assert torch.equal(noise.categorical(laws, key, rows), tokens)
        torch.testing.assert_close(ours, laws)


def test_ties_stay_together_and_the_first_of_equal_scores_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    every = EVERY[::3]
    logits = _logits(len(every), 97).round()
    logits[:, 40:60] = -torch.inf
    logits[:, 3::7] = -0.0
    params, noise = _params(every), _noise(len(every))
    laws = sampling.laws(logits, params)
    wanted = _reference(monkeypatch, "laws", logits, params)
    torch.testing.assert_close(laws, wanted)
    assert torch.equal(laws > 0, wanted > 0)
    greedy = torch.zeros_like(params.temperature_R)
    tokens = sampling.sample(
        logits,
        RowParams(greedy, params.top_k_R, params.top_p_R, params.min_p_R),
        noise.keys(PositionKey(0), torch.arange(len(every))),
    )
    first = [row.index(max(row)) for row in logits.tolist()]
    assert tokens.tolist() == first


def test_a_row_does_not_see_the_others_nor_how_it_lies_in_memory() -> None:
    rows = EVERY[2::13]
    logits, params, noise = _logits(len(rows), 97).bfloat16(), _params(rows), _noise(len(rows))
    every = torch.arange(len(rows))
    laws, tokens = sampling.laws(logits, params), sampling.sample(logits, params, noise.keys(PositionKey(0), every))
    spread = torch.full((len(rows), 2 * 97 + 5), torch.nan).bfloat16()[:, 5::2]
    spread[:] = logits
    assert torch.equal(sampling.laws(spread, params), laws)
    for row in range(len(rows)):
        at = torch.tensor([row])
        assert sampling.sample(logits[at], params.select(at), noise.keys(PositionKey(0), at)).tolist() == [tokens[row]]


def _weights(rows: int, size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Laws and weights of all scales, most of them zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = (6 * torch.randn(rows, size, generator=generator, dtype=dtype)).softmax(-1)
    weights *= torch.rand(rows, size, generator=generator) < 0.3
    scale = torch.randint(-100, 60, (rows, 1), generator=generator).to(dtype)
    return torch.where(torch.arange(rows)[:, None] % 2 == 0, weights, weights * 2**scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 5, 129, 5001])
def test_draws_are_the_reference_s_bit_for_bit(monkeypatch: pytest.MonkeyPatch, size: int, dtype: torch.dtype) -> None:
    weights = _weights(24, size, dtype)
    weights[-1] = 0
    keys = _noise(24).keys(RoundKey("residual", 2), torch.arange(24))
    tokens = sampling.draw(weights, keys)
    assert torch.equal(tokens, _reference(monkeypatch, "draw", weights, keys))
    has_mass = weights.amax(1) > 0
    assert bool((weights.gather(1, tokens[:, None])[has_mass] > 0).all()) and not tokens[~has_mass].any()


def test_integers_invert_exactly_and_as_production_does() -> None:
    weights = _weights(400, 300, torch.float32, seed=3)
    numbers = _noise(400).keys(PositionKey(0), torch.arange(400)).bits()
    numbers[:40], numbers[40:80] = 0, (1 << 53) - 1
    tokens = invert_integers(weights, numbers).tolist()
    for row, bits, token in zip(weights.tolist(), numbers.tolist(), tokens, strict=True):
        # Every float32 is an integer over 2**149.
        exact = [int(weight * 2.0**149) for weight in row]
        if not sum(exact):
            continue
        assert exact[token] > 0
        below, goal = sum(exact[:token]), sum(exact) * bits
        assert below << 53 <= goal + (sum(exact) >> 5) and goal < (below + exact[token] + (sum(exact) >> 58) << 53)
    laws = _logits(3000, 50).softmax(-1)
    noise = _noise(3000)
    keys = noise.keys(PositionKey(0), torch.arange(3000))
    cumulative = laws.cumsum(-1, dtype=torch.float64)
    uniform = noise.uniform(PositionKey(0), torch.arange(3000))[:, None]
    wanted = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
    assert torch.equal(invert_integers(laws, keys.bits()), wanted)


def test_noise_draws_with_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    laws, noise, rows = _logits(20, 33).softmax(-1), _noise(20), torch.arange(20)
    for key in (PositionKey(4), GumbelKey(0), RoundKey("draft", 9)):
        tokens = noise.categorical(laws, key, rows)
        with monkeypatch.context() as patch:
            patch.delenv("SPECDEC_KERNELS")
            assert torch.equal(noise.categorical(laws, key, rows), tokens)


def test_what_does_not_fit_is_refused() -> None:
    keys = _noise(2).keys(PositionKey(0), torch.arange(2))
    with pytest.raises(ValueError, match=r"\(2,\) rows .* scores \(3, 4\)"):
        sampling.draw(torch.ones(3, 4), keys)
    with pytest.raises(ValueError, match="no tokens"):
        sampling.draw(torch.ones(2, 0), keys)
    with pytest.raises(ValueError, match=r"\(3,\) rows"):
        sampling.laws(torch.ones(2, 4), _params(EVERY[:3]))
    assert sampling.draw(torch.ones(0, 4), _noise(0).keys(PositionKey(0), torch.arange(0))).tolist() == []
