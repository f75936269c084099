"""Compiles launched Triton kernels for a GPU that need not be there: what the tests run in a process that does not interpret.

Prints a line of JSON per kernel: its name, bytes of shared memory, registers per thread, and bytes spilled.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from test_tree_attention import make_case
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from specdec.kernels.kv_write.triton import kv_write_triton
from specdec.kernels.path_commit.triton import path_commit_triton
from specdec.kernels.tree_attention.invariant_triton import tree_attention_invariant_triton
from specdec.kernels.tree_attention.triton import tree_attention_triton

# Of an H100 or H200.
TARGET, ARCHITECTURE = GPUTarget("cuda", 90, 32), "sm_90a"
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}


def compile_launch(kernel: JITFunction, *args: Any, grid: object, warmup: bool, **options: Any) -> None:
    """In the place of a launch; pointers and strides count as aligned, as those of real models are."""
    constants = {name: options.pop(name) for name in kernel.arg_names if name in options}
    signature, aligned = dict.fromkeys(kernel.arg_names, "constexpr"), {}
    for i, (name, arg) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(arg, torch.Tensor):
            signature[name] = f"*{TYPES[arg.dtype]}"
        else:
            signature[name] = "fp32" if isinstance(arg, float) else "i32"
        if isinstance(arg, torch.Tensor) or (
            isinstance(arg, int) and arg % 16 == 0 and not kernel.params[i].do_not_specialize
        ):
            aligned[(i,)] = [["tt.divisibility", 16]]
        elif arg == 1 and not kernel.params[i].do_not_specialize:
            signature[name], constants[name] = "constexpr", 1
    source = ASTSource(kernel, signature, constants, aligned)
    options.pop("debug", None)
    compiled = triton.compile(source, target=TARGET, options=options)
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [ptxas, "-v", f"--gpu-name={ARCHITECTURE}", file.name, "-o", "/dev/null"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    row = {"kernel": kernel.__name__, "shared": compiled.metadata.shared}
    for name, pattern in (("registers", r"Used (\d+) registers"), ("spilled", r"(\d+) bytes spill stores")):
        row[name] = int(re.search(pattern, told)[1])
    row["products"] = sorted(set(re.findall(r"(?:wgmma\.)?mma\S*\.m\d+n\d+k\d+\S*", compiled.asm["ptx"])))
    row["fused"] = len(re.findall(r"\bfma\.", compiled.asm["ptx"]))
    print(json.dumps(row), flush=True)


def main(shapes: list[tuple[int, int, int, str]]) -> None:
    """Query heads, kv heads, a head's numbers and a dtype's name."""
    JITFunction.run = compile_launch
    for heads, groups, size, name in shapes:
        for parts in ([(1, None, 20)], [(20, 20, 20), (64, None, 20)]):
            case = make_case((heads, groups, size, size), parts, False, getattr(torch, name))
            sinks = torch.zeros(heads, dtype=case.query_THE.dtype)
            arguments = case.query_THE, case.keys_SGE, case.values_SGE, case.plan.batched(), 1.0
            tree_attention_triton(*arguments, None, None, None)
            if len(parts) == 2:
                tree_attention_triton(*arguments, 100, 2.0, sinks)
                tree_attention_invariant_triton(*arguments, None, None, None)
        if heads == groups or size == 128:
            kv_write_triton(case.keys_SGE, case.values_SGE, case.plan.slots_T, case.keys_SGE[:84], case.values_SGE[:84])
            moves = torch.arange(6)[None]
            path_commit_triton([case.keys_SGE[None]], moves + 1, moves)


if __name__ == "__main__":
    import sys

    main([(int(h), int(g), int(e), name) for h, g, e, name in (one.split(",") for one in sys.argv[1:])])
