"""What the library means to reach on a GPU, and which rows of measurements reach it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MIN_SHARE_OF_COPY, MIN_CONTEXT = 0.85, 4096
MAX_HOST_SHARE = 0.03
PASSED, MISSED = "passed", "missed"


def aims_of(row: Mapping[str, Any]) -> dict[str, str]:
    """`passed` or `missed` for each aim that the row speaks of.

    Attention over contexts from `MIN_CONTEXT` on reads at least `MIN_SHARE_OF_COPY` of the bytes per second of a copy; the GPU
    waits for the host less than `MAX_HOST_SHARE` of the time at the shapes of a large model, as engines run by default, that
    is with CUDA graphs. A CPU's times speak of nothing.
    """
    aims: dict[str, bool] = {}
    if row["is_gpu"] and row["measure"] == "attention" and row["context"] >= MIN_CONTEXT:
        aims[f"share_of_copy >= {MIN_SHARE_OF_COPY}"] = row["share_of_copy"] >= MIN_SHARE_OF_COPY
    if row["is_gpu"] and row["measure"] == "decode" and row.get("stand_in") and row["cuda_graphs"]:
        aims[f"host_share < {MAX_HOST_SHARE}"] = row["host_share"] < MAX_HOST_SHARE
    return {name: PASSED if is_met else MISSED for name, is_met in aims.items()}
