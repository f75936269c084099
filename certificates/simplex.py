"""Regions of the numbers behind a race of three: which exponentials let which token win, and how likely that is.

Three independent exponential numbers, divided by their sum, are uniform on the triangle of barycentric coordinates
(x_0, x_1, x_2). Who wins depends on ratios alone, so every outcome of any number of races is a convex polygon in that
triangle, and its probability is the polygon's share of the area.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

Point = tuple[float, float, float]
Region = tuple[Point, ...]

MAX_RUNNERS = 3
WHOLE: Region = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


def area(region: Region) -> float:
    """The region's share of the triangle."""
    doubled = 0.0
    for i in range(1, len(region) - 1):
        (x, y, _), (a, b, _), (c, d, _) = region[0], region[i], region[i + 1]
        doubled += (a - x) * (d - y) - (c - x) * (b - y)
    return abs(doubled)


def winning(region: Region, rates: Seq[float]) -> dict[int, Region]:
    """Per token with a rate, the part of `region` where x_v / rate_v is the smallest; of at most `MAX_RUNNERS` tokens."""
    assert len(rates) <= MAX_RUNNERS
    runners = [token for token, rate in enumerate(rates) if rate > 0]
    won = {}
    for token in runners:
        part = region
        for other in runners:
            if other != token:
                part = _clip(part, token, rates[token], other, rates[other])
        won[token] = part
    return won


def _clip(region: Region, token: int, rate: float, other: int, other_rate: float) -> Region:
    """The part where x_token / rate <= x_other / other_rate (Sutherland and Hodgman 1974)."""
    kept: list[Point] = []
    heights = [point[token] * other_rate - point[other] * rate for point in region]
    for i, (point, height) in enumerate(zip(region, heights, strict=True)):
        before, height_before = region[i - 1], heights[i - 1]
        if (height <= 0) != (height_before <= 0):
            share = height_before / (height_before - height)
            x, y, z = (b + share * (p - b) for b, p in zip(before, point, strict=True))
            kept.append((x, y, z))
        if height <= 0:
            kept.append(point)
    return tuple(kept)
