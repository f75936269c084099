"""OpenVINO GenAI's continuous-batching pipeline, stepped by hand; optimum-intel converts the model."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any

from protocol import Decoded, Loaded, serve


def load(job: dict[str, Any]) -> Loaded:
    """`options` hold `properties` of device and pipeline, `generation`, fields of GenerationConfig, and `draft_model`."""
    import openvino_genai as genai
    from openvino import Tensor

    options = dict(job["options"])
    generation = dict(options.get("generation", {}))
    precision = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[job["dtype"]]
    properties: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": job["num_threads"],
        "INFERENCE_PRECISION_HINT": precision,
        # Keys and values are 8-bit by default, which would be another model's.
        "KV_CACHE_PRECISION": precision,
        **options.get("properties", {}),
    }
    if options.get("draft_model"):
        properties["draft_model"] = genai.draft_model(str(_converted(job["draft"])), "CPU")
    scheduler = genai.SchedulerConfig()
    # The same prompts are decoded again and again, and each time their cost counts.
    scheduler.enable_prefix_caching = False
    scheduler.max_num_seqs = job["max_batch_size"]
    scheduler.cache_size = 1
    pipeline = genai.ContinuousBatchingPipeline(str(_converted(job["model"])), scheduler, "CPU", properties)
    ids = itertools.count()

    def decode(prompts: list[list[int]], max_new_tokens: int, stop_token_ids: list[int]) -> Decoded:
        config = genai.GenerationConfig()
        config.max_new_tokens = max_new_tokens
        config.do_sample = False
        config.ignore_eos = not stop_token_ids
        config.stop_token_ids = set(stop_token_ids)
        if stop_token_ids:
            config.set_eos_token_id(stop_token_ids[0])
        for name, value in generation.items():
            setattr(config, name, value)
        outputs: list[list[int]] = [[] for _ in prompts]
        first: dict[int, float] = {}
        num_forwards = 0
        start = time.perf_counter()
        handles = [pipeline.add_request(next(ids), Tensor([prompt]), config) for prompt in prompts]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            for number, handle in enumerate(handles):
                while handle.can_read():
                    (one,) = handle.read().values()
                    if one.generated_ids:
                        first.setdefault(number, time.perf_counter() - start)
                        outputs[number] += one.generated_ids
                        num_forwards += 1
        seconds = time.perf_counter() - start
        return Decoded(outputs, seconds, sum(first.values()) / len(prompts), num_forwards)

    return Loaded(genai.__version__, decode)


def _converted(model: str) -> Path:
    """The folder of the model in OpenVINO's format, inside its own, made once. Weights keep their values: none is quantized."""
    folder = Path(model) / "openvino"
    if not (folder / "openvino_model.xml").is_file():
        from optimum.exporters.openvino import main_export
        from optimum.intel import OVConfig

        unfinished = folder.with_name("openvino.unfinished")
        main_export(model, unfinished, task="text-generation-with-past", ov_config=OVConfig(dtype="auto"))
        os.rename(unfinished, folder)
    return folder


if __name__ == "__main__":
    serve(load)
