"""llama.cpp through llama-cpp-python, one prompt at a time; the model is a GGUF file that holds the same weights."""

from __future__ import annotations

import time
from typing import Any

from protocol import Decoded, Loaded, serve


def load(job: dict[str, Any]) -> Loaded:
    """`options` go to `Llama`, but for `prompt_lookup`, options of its LlamaPromptLookupDecoding."""
    import llama_cpp
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    options = dict(job["options"])
    lookup = options.pop("prompt_lookup", None)
    llm = llama_cpp.Llama(
        model_path=job["model"],
        draft_model=None if lookup is None else LlamaPromptLookupDecoding(**lookup),
        n_ctx=job["max_length"],
        n_threads=job["num_threads"],
        n_threads_batch=job["num_threads"],
        verbose=False,
        **options,
    )

    def decode(prompts: list[list[int]], max_new_tokens: int, stop_token_ids: list[int]) -> Decoded:
        (prompt,) = prompts
        # It keeps the last text's keys and values, and would start behind what this prompt shares with it.
        llm.reset()
        output: list[int] = []
        forwards, first = 0, 0.0
        evaluate = llm.eval

        def counted(tokens: Any) -> None:
            nonlocal forwards
            forwards += 1
            evaluate(tokens)

        llm.eval = counted
        start = time.perf_counter()
        try:
            for token in llm.generate(prompt, temp=0.0, repeat_penalty=1.0):
                first = first or time.perf_counter() - start
                output.append(token)
                if len(output) == max_new_tokens or token in stop_token_ids:
                    break
            seconds = time.perf_counter() - start
        finally:
            llm.eval = evaluate
        return Decoded([output], seconds, first, forwards)

    return Loaded(llama_cpp.__version__, decode)


if __name__ == "__main__":
    serve(load)
