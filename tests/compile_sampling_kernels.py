"""Compiles the sampling and acceptance kernels for a GPU, which need not be there; a process, for conftest interprets."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from specdec.kernels.acceptance import triton as acceptance
from specdec.kernels.sampling import triton as sampling

# Types of arguments by name; all others point to int64.
TYPES = {
    "scores": "*bf16",
    **dict.fromkeys(("temperatures", "top_ps", "min_ps", "laws", "probs", "drafted"), "*fp32"),
    **dict.fromkeys(("score_stride", "law_stride", "stride", "index"), "i64"),
    **dict.fromkeys(("num_nodes", "num_draws"), "i32"),
}
VOCABULARY = {"SIZE": 5000, "BLOCK": 2048, "BITS": 49}
COINS = {"ACCEPT": 3, "RESIDUAL": 4, "BLOCK_N": 32, "BLOCK_M": 16}
KEYED = {"PURPOSE": 1, "HAS_INDICES": True}
KERNELS: list[tuple[Any, dict[str, Any]]] = [
    *((sampling._rows_kernel, {**VOCABULARY, **KEYED, "WANTS": wants}) for wants in ("laws", "token")),
    (sampling._draw_kernel, {**VOCABULARY, **KEYED, "IS_RACE": True}),
    (acceptance._follow_kernel, {"BLOCK_N": 32}),
    (acceptance._rejection_kernel, {**VOCABULARY, **COINS, "HAS_LAWS": True}),
    (acceptance._traversal_kernel, {**VOCABULARY, **COINS, "HAS_LAWS": True}),
]

if __name__ == "__main__":
    for kernel, constants in KERNELS:
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else TYPES.get(name, "*i64") for name in names}
        source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
        compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 4})
        print(kernel.__name__, len(compiled.asm["cubin"]))
