"""vLLM, its engine in this very process: no engine core of its own that spins while it waits."""

from __future__ import annotations

import itertools
import os
import time
from typing import Any

from protocol import Decoded, Loaded, serve


def load(job: dict[str, Any]) -> Loaded:
    """`options` go to `vllm.LLM`; where they hold a `speculative_config` without a model, the draft model is put in."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # Its own binding would leave a core to an API server that is not there.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import vllm
    from vllm import LLM, SamplingParams

    options = dict(job["options"])
    speculative = options.get("speculative_config")
    if speculative and speculative.get("method") == "draft_model":
        options["speculative_config"] = {"model": job["draft"], **speculative}
    llm = LLM(
        model=job["model"],
        dtype=job["dtype"],
        max_model_len=job["max_length"],
        max_num_seqs=job["max_batch_size"],
        skip_tokenizer_init=True,
        # The same prompts are decoded again and again, and each time their cost counts.
        enable_prefix_caching=False,
        **options,
    )
    engine, ids = llm.llm_engine, itertools.count()

    def decode(prompts: list[list[int]], max_new_tokens: int, stop_token_ids: list[int]) -> Decoded:
        params = SamplingParams(
            temperature=0.0,
            max_tokens=max_new_tokens,
            ignore_eos=True,
            stop_token_ids=stop_token_ids,
            detokenize=False,
        )
        names = [str(next(ids)) for _ in prompts]
        outputs: dict[str, list[int]] = {name: [] for name in names}
        first: dict[str, float] = {}
        num_forwards = 0
        start = time.perf_counter()
        for name, prompt in zip(names, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for one in engine.step():
                token_ids = list(one.outputs[0].token_ids)
                if len(token_ids) > len(outputs[one.request_id]):
                    first.setdefault(one.request_id, time.perf_counter() - start)
                    outputs[one.request_id] = token_ids
                    num_forwards += 1
        seconds = time.perf_counter() - start
        ttft_s = sum(first.values()) / len(prompts)
        return Decoded([outputs[name] for name in names], seconds, ttft_s, num_forwards)

    return Loaded(vllm.__version__, decode)


if __name__ == "__main__":
    serve(load)
