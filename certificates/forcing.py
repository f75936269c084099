"""Teacher forcing: a model's logits, and its processed laws, along a text that somebody else wrote."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from specdec.model import PagedModel, Segment
from specdec.pages import PagePool, PageTable
from specdec.sampling import BatchSampling, SamplingParams


class TeacherForcing:
    """Runs a model over given tokens, `chunk` of them per forward; `chunk` 1 is the shape of plain decoding.

    It shares the target's forward with production and nothing of drafters, trees or rules. The prompt before the first
    wanted token goes in pieces of at most `prefill_chunk` tokens.
    """

    def __init__(self, model: PagedModel, chunk: int = 64, prefill_chunk: int = 512, page_size: int = 16) -> None:
        if chunk < 1 or prefill_chunk < 1:
            raise ValueError(f"chunk={chunk} and prefill_chunk={prefill_chunk} must be >= 1")
        self.model, self.chunk, self.prefill_chunk = model, chunk, prefill_chunk
        self._pool = PagePool(0, page_size)
        self._cache = model.new_cache(self._pool)

    def logits(self, token_ids: Seq[int], start: int) -> Iterator[Tensor]:
        """Per forward the logits [T, V] from which tokens `start`, `start` + 1, ... of the text were chosen."""
        if not 1 <= start < len(token_ids):
            raise ValueError(
                f"start={start} must leave a prompt before it and a token behind it ({len(token_ids)} tokens)"
            )
        last = len(token_ids) - 1
        self._pool.grow(self._pool.pages_for(last))
        table = PageTable(self._pool)
        table.reserve(last, 0)
        device = self.model.device
        tokens = torch.tensor(list(token_ids), dtype=torch.int64, device=device)
        try:
            at = 0
            while at < last:
                # The token before the first wanted one is the root: it is computed with the text, not with the prompt.
                end = min(at + self.prefill_chunk, start - 1) if at < start - 1 else min(at + self.chunk, last)
                wanted = torch.arange(0 if at < start - 1 else end - at, device=device)
                positions = torch.arange(at, end, device=device)
                result = self.model.forward([Segment(table, at, tokens[at:end], positions)], self._cache, wanted)
                if len(wanted):
                    yield result.logits_RV
                at = end
        finally:
            table.release()

    def laws(
        self, prompt: Seq[int], output: Seq[int], params: SamplingParams, dtype: torch.dtype = torch.float32
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Per forward: the index in `output` of its first token, logits and processed laws [T, V] of its tokens."""
        at = 0
        for logits in self.logits([*prompt, *output], len(prompt)):
            yield at, logits, processed(logits, prompt, output, at, params, dtype)
            at += len(logits)


def processed(
    logits_TV: Tensor, prompt: Seq[int], output: Seq[int], first: int, params: SamplingParams, dtype: torch.dtype
) -> Tensor:
    """Laws [T, V] of `output[first:]` through production's own sampling; penalties see the prompt and what was emitted."""
    sampling = BatchSampling([params], [prompt], [output[:first]], logits_TV.shape[1], logits_TV.device)
    rows = torch.zeros(len(logits_TV), dtype=torch.int64, device=logits_TV.device)
    paths = None
    if params.has_penalties and len(logits_TV) > 1:
        # What was emitted within this chunk lies behind the committed tokens like a drafted path: row t sees t of it.
        recent = torch.tensor(list(output[first : first + len(logits_TV) - 1]), device=logits_TV.device)
        paths = torch.where(torch.ones(len(logits_TV), len(recent), device=logits_TV.device).tril(-1) > 0, recent, -1)
    return sampling.probabilities(logits_TV, rows, paths, dtype)
