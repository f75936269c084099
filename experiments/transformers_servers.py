"""transformers' own ways to serve many requests: batches that start and end together, and continuous batching."""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack
from typing import Any

import torch
from transformers import ContinuousBatchingConfig
from transformers.generation.streamers import BaseStreamer

from specdec.config import EngineConfig
from specdec.experiments.contenders import counted_forwards, greedy_config, own_attention
from specdec.experiments.driving import Clock, Emission
from specdec.experiments.workload import LoadRequest
from specdec.live import Gauges
from specdec.model import PagedModel
from specdec.sampling import SamplingParams


class StaticServer:
    """`generate` on padded batches of at most `max_batch_size` requests; who comes in between waits for the next batch.

    A row that has ended keeps its place until the longest has. Greedy.
    """

    def __init__(self, target: PagedModel, max_batch_size: int, clock: Clock) -> None:
        self._target, self._size, self._clock = target, max_batch_size, clock
        self._waiting: deque[LoadRequest] = deque()
        self._num_steps = self._num_rows = self._num_prompt_tokens = 0

    @property
    def is_idle(self) -> bool:
        return not self._waiting

    def submit(self, request: LoadRequest) -> None:
        self._waiting.append(request)

    def step(self, wait_s: float | None) -> list[Emission]:
        batch = [self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))]
        model, streamer = self._target.model, _Steps(self._clock)
        config = greedy_config(self._target, max((one.params for one in batch), key=lambda one: one.max_new_tokens))
        longest = max(len(one.prompt) for one in batch)
        pads = [longest - len(one.prompt) for one in batch]
        ids = torch.tensor([[config.pad_token_id] * pad + one.prompt for pad, one in zip(pads, batch, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
        with own_attention(model, config), counted_forwards(model) as count, torch.inference_mode():
            model.generate(ids.to(model.device), attention_mask=mask.to(model.device), streamer=streamer)
        self._num_steps += len(count)
        self._num_rows += len(batch) * len(count)
        self._num_prompt_tokens += sum(len(one.prompt) for one in batch)
        return [emission for row, one in enumerate(batch) for emission in self._emissions(row, one, streamer)]

    def _emissions(self, row: int, request: LoadRequest, streamer: _Steps) -> list[Emission]:
        """What the user of one row sees: nothing behind the end."""
        found = []
        ends = set() if request.params.ignore_eos else self._target.eos_token_ids
        for place, (time_s, tokens) in enumerate(streamer.steps, 1):
            is_last = tokens[row] in ends or place == request.params.max_new_tokens
            found.append(Emission(request.index, [tokens[row]], time_s, is_last))
            if is_last:
                break
        return found

    def gauges(self) -> Gauges:
        occupancy = self._num_rows / (self._num_steps * self._size) if self._num_steps else None
        return Gauges(waiting=len(self._waiting), occupancy=occupancy, tau=1.0)

    def cost(self) -> dict[str, Any]:
        return {
            "tau": 1.0,
            "occupancy": self._num_rows / (self._num_steps * self._size),
            "num_steps": self._num_steps,
            "num_prompt_tokens": self._num_prompt_tokens,
            "num_prompt_tokens_computed": self._num_prompt_tokens,
            "prefix_hit_rate": 0.0,
            "num_preemptions": 0,
        }

    def close(self) -> None:
        """Nothing is held between batches."""


class ContinuousServer:
    """`ContinuousBatchingManager`, which generates in a thread of its own. Greedy; page size, pages, batch size and prompt
    tokens per step are those of the engine it is compared with.

    Raises RuntimeError where the manager's thread dies.
    """

    def __init__(
        self, target: PagedModel, engine: EngineConfig, longest: int, share_prefixes: bool, ignore_eos: bool
    ) -> None:
        self._model = target.model
        ends = sorted(target.eos_token_ids)
        self._ends: int | list[int] = -1 if ignore_eos or not ends else ends
        pages = engine.max_batch_size * -(-longest // engine.page_size)
        sizes = ContinuousBatchingConfig(
            page_size=engine.page_size,
            num_blocks=engine.num_pages or pages,
            max_batch_tokens=engine.prefill_chunk + engine.max_batch_size,
            max_requests_per_batch=engine.max_batch_size,
            allow_block_sharing=share_prefixes,
        )
        self._open: dict[str, LoadRequest] = {}
        self._num_tokens = 0
        self._stack = ExitStack()
        config = greedy_config(target, SamplingParams(ignore_eos=ignore_eos))
        self._stack.enter_context(own_attention(self._model, config))
        self._manager = self._model.init_continuous_batching(config, sizes)
        self._manager.warmup()
        self._manager.start()

    @property
    def is_idle(self) -> bool:
        return not self._open

    def submit(self, request: LoadRequest) -> None:
        name = str(request.index)
        self._open[name] = request
        self._manager.add_request(
            request.prompt, name, request.params.max_new_tokens, record_timestamps=True, eos_token_id=self._ends
        )

    def step(self, wait_s: float | None) -> list[Emission]:
        """The requests that ended meanwhile, each with all of its tokens and their times."""
        found: list[Emission] = []
        # Not for long at a time: a thread that has died is to be noticed.
        result = self._manager.get_result(timeout=1.0 if wait_s is None else min(wait_s, 1.0))
        if result is None and not self._manager.is_running():
            raise RuntimeError(f"transformers' continuous batching stopped with {len(self._open)} requests open")
        while result is not None:
            if result.error is not None:
                raise RuntimeError(
                    f"transformers' continuous batching failed request {result.request_id}: {result.error}"
                )
            found += self._emissions(self._open.pop(result.request_id), result)
            result = self._manager.get_result(timeout=0.0)
        return found

    def _emissions(self, request: LoadRequest, result: Any) -> list[Emission]:
        pairs = list(zip(result.generated_tokens, result.timestamps, strict=True))
        self._num_tokens += len(pairs)
        return [
            Emission(request.index, [token], time_s, place == len(pairs))
            for place, (token, time_s) in enumerate(pairs, 1)
        ]

    def gauges(self) -> Gauges:
        return Gauges(tau=1.0)

    def cost(self) -> dict[str, Any]:
        return {"tau": 1.0, "num_steps": self._manager.current_batch}

    def close(self) -> None:
        self._manager.stop(hard_stop=bool(self._open))
        self._manager.destroy()
        self._stack.close()


class _Steps(BaseStreamer):
    """Every step of a batch: its time and each row's token; `generate` puts the prompts first."""

    def __init__(self, clock: Clock) -> None:
        self.steps: list[tuple[float, list[int]]] = []
        self._clock, self._has_prompts = clock, False

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompts:
            self.steps.append((self._clock.now(), value.tolist()))
        self._has_prompts = True

    def end(self) -> None:
        """Nothing is held back."""
