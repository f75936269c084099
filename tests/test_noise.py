"""Keyed noise: what a value depends on, what is never drawn, and that the numbers are as good as random."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import pytest
import torch
from scipy import stats
from torch import Tensor

from specdec.interfaces import Noise
from specdec.noise import CounterNoise, GumbelKey, Key, PositionKey, RoundKey

Purpose = Literal["draft", "accept", "residual"]
ROUND_PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
# The seeds are fixed, so these tests cannot flake; far below chance means that the hash is broken.
LEAST_P = 1e-4
COUNT = 40_000


def _arange(size: int) -> Tensor:
    return torch.arange(size)


def _one(seed: int, round_: int, position: int, key: Key) -> float:
    return float(CounterNoise([seed], [round_], [position]).uniform(key, _arange(1)))


KEYS: list[Key] = [
    PositionKey(0),
    PositionKey(5),
    *(RoundKey(p, i) for p in ROUND_PURPOSES for i in (0, 1, 7)),
]


def _batch() -> CounterNoise:
    return CounterNoise([7, 8, 7, -3, 1 << 63], [0, 3, 4, 1, 1], [10, 11, 12, 13, 500])


# What a value depends on.


def test_is_a_noise() -> None:
    assert isinstance(_batch(), Noise)


@pytest.mark.parametrize("key", KEYS, ids=repr)
def test_values_do_not_depend_on_the_batch(key: Key) -> None:
    whole = _batch().uniform(key, _arange(5)).tolist()
    assert len(set(whole)) == 5
    rows = zip([7, 8, 7, -3, 1 << 63], [0, 3, 4, 1, 1], [10, 11, 12, 13, 500], strict=True)
    assert [_one(*row, key) for row in rows] == whole
    order = torch.tensor([3, 0, 4, 1])
    assert _batch().uniform(key, order).tolist() == [whole[b] for b in order]
    assert _batch().select([3, 0, 4, 1]).uniform(key, _arange(4)).tolist() == [whole[b] for b in order]


def test_an_index_per_row_equals_one_index_each() -> None:
    rows, index = torch.tensor([4, 0, 2]), torch.tensor([9, 0, 3])
    got = _batch().uniform(RoundKey("accept", index), rows)
    wanted = [_batch().uniform(RoundKey("accept", int(i)), row[None]) for i, row in zip(index, rows, strict=True)]
    torch.testing.assert_close(got, torch.cat(wanted), rtol=0, atol=0)


def test_every_part_of_the_key_matters() -> None:
    drawn = [
        _one(seed, round_, 0, RoundKey(purpose, index))
        for seed in (0, 1, 2, -1, GOLDEN)
        for purpose in ROUND_PURPOSES
        for round_ in range(8)
        for index in range(8)
    ]
    drawn += [_one(seed, 0, position, PositionKey(0)) for seed in (0, 1, 2, -1, GOLDEN) for position in range(64)]
    assert len(set(drawn)) == len(drawn)


def test_position_keys_see_the_absolute_position_alone() -> None:
    assert _one(5, 0, 10, PositionKey(3)) == _one(5, 9, 13, PositionKey(0)) == _one(5, 2, 14, PositionKey(-1))
    assert _one(5, 0, 10, PositionKey(3)) != _one(5, 0, 10, PositionKey(2))
    assert _one(5, 0, 10, PositionKey(3)) != _one(6, 0, 10, PositionKey(3))


def test_round_keys_do_not_see_the_position() -> None:
    for purpose in ROUND_PURPOSES:
        assert _one(5, 2, 10, RoundKey(purpose, 1)) == _one(5, 2, 99, RoundKey(purpose, 1))


def test_seeds_count_modulo_64_bits() -> None:
    for seed in (-1, -(1 << 63), 1 << 63, MASK, 1 << 70, 123):
        assert _one(seed, 1, 1, PositionKey(0)) == _one(seed % (1 << 64), 1, 1, PositionKey(0))


def test_purposes_outside_a_round_are_refused() -> None:
    for purpose in ("target", "Draft", ""):
        with pytest.raises(ValueError, match=repr(purpose)):
            RoundKey(purpose, 0)  # type: ignore[arg-type]


def _splitmix64(state: int) -> int:
    """The next number of java.util.SplittableRandom, in Python's own integers."""
    z = (state + GOLDEN) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_reference_hash_gives_published_numbers() -> None:
    assert _splitmix64(0) == 0xE220A8397B1DCDAF
    states = [(1234567 + i * GOLDEN) & MASK for i in range(3)]
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [_splitmix64(state) for state in states] == published


def test_uniforms_are_the_splitmix64_hash_of_their_key() -> None:
    numbers = {"target": 1, "draft": 2, "accept": 3, "residual": 4}
    for seed in (0, 1, -1, 2**62 + 12345, 1 << 63, MASK):
        for round_, position in ((0, 0), (3, 17), (2**40, 2**31)):
            for key in KEYS:
                if isinstance(key, PositionKey):
                    purpose, counter, index = "target", position + key.depth + 1, 0
                else:
                    purpose, counter, index = key.purpose, round_, int(key.index)
                state = _splitmix64((_splitmix64(seed & MASK) + numbers[purpose]) & MASK)
                state = _splitmix64((_splitmix64(state ^ counter) + index) & MASK)
                assert _one(seed, round_, position, key) == (state >> 11) / (1 << 53)


# What the two verbs do with a uniform.


def _stub(monkeypatch: pytest.MonkeyPatch, value: float | Tensor) -> CounterNoise:
    def uniform(self: CounterNoise, key: Key, rows: Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float64).expand(len(rows))

    monkeypatch.setattr(CounterNoise, "uniform", uniform)
    return CounterNoise([0], [0], [0])


def test_coins_refuse_position_keys() -> None:
    with pytest.raises(TypeError, match="PositionKey"):
        _batch().bernoulli(torch.full((5,), 0.5), PositionKey(0), _arange(5))  # type: ignore[arg-type]


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2.0**-53])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_coins_are_certain(monkeypatch: pytest.MonkeyPatch, u: float, dtype: torch.dtype) -> None:
    coins = _stub(monkeypatch, u).bernoulli(torch.tensor([0.0, 1.0], dtype=dtype), RoundKey("accept", 0), _arange(2))
    assert coins.tolist() == [False, True]


def test_coins_compare_strictly(monkeypatch: pytest.MonkeyPatch) -> None:
    probs = torch.tensor([0.25, 0.25 + 2.0**-40, 0.25 - 2.0**-40], dtype=torch.float64)
    assert _stub(monkeypatch, 0.25).bernoulli(probs, RoundKey("accept", 0), _arange(3)).tolist() == [
        False,
        True,
        False,
    ]


def _patchy_laws(dtype: torch.dtype) -> Tensor:
    """Laws with leading, trailing and inner zeros, totals far from 1, and masses over forty orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(400, 37, generator=generator, dtype=torch.float64)
    probs[200:] = 10 ** (-40 * probs[200:])
    probs[torch.rand(400, 37, generator=generator) < 0.6] = 0
    probs[::3, :5] = 0
    probs[1::3, -5:] = 0
    probs[:, 17] = torch.rand(400, generator=generator, dtype=torch.float64) + 1e-3
    scale = torch.tensor([1.0, 3.7, 1e-3, 1e5], dtype=torch.float64).repeat(100)[:, None]
    return (probs * scale).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("key", [PositionKey(0), RoundKey("residual", 3)], ids=repr)
def test_impossible_tokens_are_never_drawn(dtype: torch.dtype, key: Key) -> None:
    probs = _patchy_laws(dtype)
    for seed in range(25):
        noise = CounterNoise([seed * 1000 + b for b in range(400)], [0] * 400, [0] * 400)
        assert bool((probs.gather(1, noise.categorical(probs, key, _arange(400))[:, None]) > 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_uniforms_draw_possible_tokens(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    probs, rows, key = _patchy_laws(dtype), _arange(400), PositionKey(0)
    first = _stub(monkeypatch, 0.0).categorical(probs, key, rows)
    torch.testing.assert_close(first, (probs > 0).int().argmax(-1))
    for u in (1 - 2.0**-53, 1 - 2.0**-52):
        last = _stub(monkeypatch, u).categorical(probs, key, rows)
        assert bool((probs.gather(1, last[:, None]) > 0).all())
        # Up to the resolution of u itself, nothing possible lies behind it.
        behind = probs.double().flip(-1).cumsum(-1).flip(-1).gather(1, last[:, None]).squeeze(1) / probs.double().sum(
            -1
        )
        assert bool((behind > 0).all())


def test_a_product_that_rounds_up_to_the_total_stays_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    # For normal numbers (1 - 2^-53) * total < total; for the smallest subnormal it is the total itself.
    probs = torch.tensor([[0.0, 5e-324, 0.0, 0.0]], dtype=torch.float64)
    assert float(probs.sum()) * (1 - 2.0**-53) == float(probs.sum()) > 0
    assert _stub(monkeypatch, 1 - 2.0**-53).categorical(probs, PositionKey(0), _arange(1)).tolist() == [1]


def test_a_law_without_mass_gives_an_index_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rules draw for whole batches: rows that need no residual have an empty one, and their token is thrown away.
    for u in (0.0, 0.5, 1 - 2.0**-53):
        drawn = _stub(monkeypatch, u).categorical(torch.zeros(1, 4), RoundKey("residual", 0), _arange(1))
        assert 0 <= int(drawn) < 4


def test_inversion_at_the_boundaries(monkeypatch: pytest.MonkeyPatch) -> None:
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.25, 0.5, 0.0]]).expand(6, -1)
    u = torch.tensor([0.0, 0.25 - 2.0**-53, 0.25, 0.5 - 2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert _stub(monkeypatch, u).categorical(probs, PositionKey(0), _arange(6)).tolist() == [1, 1, 3, 3, 4, 4]
    # An unnormalised law is drawn from as if it were normalised.
    assert _stub(monkeypatch, u).categorical(probs * 8, PositionKey(0), _arange(6)).tolist() == [
        1,
        1,
        3,
        3,
        4,
        4,
    ]


def test_float32_laws_are_accumulated_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    # In float32 1 + 2^-30 is 1, and the second token could not be drawn at all.
    probs = torch.tensor([[1.0, 2.0**-30]])
    assert _stub(monkeypatch, 1 - 2.0**-40).categorical(probs, PositionKey(0), _arange(1)).tolist() == [1]
    assert _stub(monkeypatch, 1 - 2.0**-20).categorical(probs, PositionKey(0), _arange(1)).tolist() == [0]


def test_one_hot_laws_draw_their_token() -> None:
    for token in (0, 3, 9):
        probs = torch.zeros(5, 10)
        probs[:, token] = 1
        assert _batch().categorical(probs, RoundKey("draft", 2), _arange(5)).tolist() == [token] * 5


# Statistics.


def _along_seeds(key: Key, start: int = 0) -> Tensor:
    return CounterNoise(range(start, start + COUNT), [3] * COUNT, [3] * COUNT).uniform(key, _arange(COUNT))


def _along_counters(key: Key, seed: int) -> Tensor:
    return CounterNoise([seed] * COUNT, range(COUNT), range(COUNT)).uniform(key, _arange(COUNT))


def _along_indices(purpose: Purpose, seed: int, round_: int = 4) -> Tensor:
    noise = CounterNoise([seed], [round_], [0])
    return noise.uniform(RoundKey(purpose, _arange(COUNT)), torch.zeros(COUNT, dtype=torch.int64))


LINES: dict[str, Callable[[], Tensor]] = {
    "seeds-target": lambda: _along_seeds(PositionKey(0)),
    "seeds-accept": lambda: _along_seeds(RoundKey("accept", 0)),
    "seeds-large": lambda: _along_seeds(RoundKey("draft", 0), start=(1 << 63) - COUNT // 2),
    "positions": lambda: _along_counters(PositionKey(0), seed=0),
    "rounds-draft": lambda: _along_counters(RoundKey("draft", 0), seed=1),
    "rounds-residual": lambda: _along_counters(RoundKey("residual", 5), seed=-1),
    "indices-draft": lambda: _along_indices("draft", seed=0),
    "indices-accept": lambda: _along_indices("accept", seed=12345),
}


def _independence(first: Tensor, second: Tensor, bins: int = 16) -> float:
    cell = (first * bins).long() * bins + (second * bins).long()
    return float(stats.chisquare(torch.bincount(cell, minlength=bins * bins).numpy()).pvalue)


@pytest.mark.parametrize("line", LINES)
def test_neighbouring_keys_are_uniform_and_independent(line: str) -> None:
    u = LINES[line]()
    assert bool(((u >= 0) & (u < 1)).all())
    assert stats.kstest(u.numpy(), "uniform").pvalue > LEAST_P
    assert _independence(u[:-1], u[1:]) > LEAST_P
    # The low bits decide nothing in a coin but everything between two close tokens.
    assert stats.kstest(((u * 2.0**33) % 1).numpy(), "uniform").pvalue > LEAST_P


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(RoundKey("draft", 0), RoundKey("accept", 0), id="draft-accept"),
        pytest.param(RoundKey("accept", 0), RoundKey("residual", 0), id="accept-residual"),
        pytest.param(PositionKey(-1), RoundKey("draft", 0), id="target-draft"),
        pytest.param(RoundKey("accept", 0), RoundKey("accept", 1), id="neighbouring-nodes"),
        pytest.param(PositionKey(0), PositionKey(1), id="neighbouring-positions"),
    ],
)
def test_different_keys_of_the_same_requests_are_independent(first: Key, second: Key) -> None:
    assert _independence(_along_seeds(first), _along_seeds(second)) > LEAST_P


def test_keys_on_a_diagonal_are_independent() -> None:
    # A hash that merely added its parts would give (round r, node i + 1) the number of (round r + 1, node i).
    for seed in (0, 99):
        here = _along_counters(RoundKey("accept", 1), seed)
        assert _independence(here[:-1], _along_counters(RoundKey("accept", 0), seed)[1:]) > LEAST_P
        later = _along_indices("draft", seed + 1)
        assert _independence(_along_indices("draft", seed)[1:], later[:-1]) > LEAST_P


@pytest.mark.parametrize("scale", [1.0, 0.37], ids=["normalised", "unnormalised"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frequencies_are_those_of_the_law(dtype: torch.dtype, scale: float) -> None:
    law = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.15, 0.1, 0.04, 0.01, 0.0], dtype=torch.float64)
    probs = (law * scale).to(dtype).expand(COUNT, -1)
    expected = (law[law > 0] * COUNT).numpy()
    lines: dict[str, Any] = {
        "positions": (CounterNoise([3] * COUNT, [0] * COUNT, range(COUNT)), PositionKey(2)),
        "seeds": (CounterNoise(range(COUNT), [0] * COUNT, [7] * COUNT), PositionKey(2)),
        "nodes": (CounterNoise([3] * COUNT, [0] * COUNT, [7] * COUNT), RoundKey("draft", _arange(COUNT))),
        "rounds": (CounterNoise([3] * COUNT, range(COUNT), [7] * COUNT), RoundKey("residual", 1)),
    }
    for noise, key in lines.values():
        counts = torch.bincount(noise.categorical(probs, key, _arange(COUNT)), minlength=9)
        assert counts[law == 0].sum() == 0
        assert stats.chisquare(counts[law > 0].numpy(), expected).pvalue > LEAST_P


@pytest.mark.parametrize("prob", [0.01, 0.3, 0.99])
def test_coins_fall_as_often_as_they_should(prob: float) -> None:
    noise = CounterNoise(range(COUNT), [0] * COUNT, [0] * COUNT)
    heads = noise.bernoulli(torch.full((COUNT,), prob), RoundKey("accept", 1), _arange(COUNT)).sum()
    assert stats.binomtest(int(heads), COUNT, prob).pvalue > LEAST_P


def test_gumbel_noise_draws_the_law_and_is_keyed_by_position() -> None:
    probs = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05], dtype=torch.float64)
    rows = torch.arange(40_000)
    noise = CounterNoise(rows.tolist(), [0] * len(rows), [7] * len(rows))
    tokens = noise.categorical(probs.expand(len(rows), -1), GumbelKey(2), rows)
    counts = torch.bincount(tokens, minlength=5).double()
    assert counts[1] == 0
    possible = probs > 0
    chi2 = float(((counts - len(rows) * probs)[possible] ** 2 / (len(rows) * probs)[possible]).sum())
    # 0.999 quantile of chi-square with 3 degrees of freedom.
    assert chi2 < 16.3
    later = CounterNoise(rows.tolist(), [5] * len(rows), [9] * len(rows))
    assert torch.equal(later.categorical(probs.expand(len(rows), -1), GumbelKey(0), rows), tokens)
    other = later.categorical(probs.expand(len(rows), -1), GumbelKey(1), rows)
    agree = float((other == tokens).double().mean())
    assert abs(agree - float((probs**2).sum())) < 0.02


def test_gumbel_noise_is_shared_between_laws_and_goes_on_without_the_winner() -> None:
    rows = torch.arange(20_000)
    noise = CounterNoise(rows.tolist(), [0] * len(rows), [0] * len(rows))
    p = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64).expand(len(rows), -1)
    q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).expand(len(rows), -1)
    one, other = (noise.categorical(law, GumbelKey(0), rows) for law in (p, q))
    # Independent draws would agree in 0.36 of the cases; by one noise no less than (1 - tv) / (1 + tv) = 0.82 do.
    assert float((one == other).double().mean()) > 0.81
    left = p.scatter(1, one[:, None], 0.0)
    second = noise.categorical(left / left.sum(1, keepdim=True), GumbelKey(0), rows)
    assert not bool((second == one).any())
    # Without replacement, the pair (0, 1) has probability 0.4 * 0.4 / 0.6.
    share = float(((one == 0) & (second == 1)).double().mean())
    assert abs(share - 0.4 * 0.4 / 0.6) < 0.015


def test_gumbel_noise_does_not_depend_on_batch_mates_and_serves_one_hot_laws() -> None:
    probs = torch.rand(3, 50, generator=torch.Generator().manual_seed(0))
    probs[1] = 0
    probs[1, 17] = 1
    noise = CounterNoise([3, 4, 5], [0] * 3, [1, 2, 3])
    together = noise.categorical(probs, GumbelKey(0), torch.arange(3))
    assert int(together[1]) == 17
    for row in range(3):
        assert torch.equal(noise.categorical(probs[row : row + 1], GumbelKey(0), torch.tensor([row]))[0], together[row])
    with pytest.raises(TypeError, match="coins are keyed by round"):
        noise.bernoulli(torch.ones(3), GumbelKey(0), torch.arange(3))
