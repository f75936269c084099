"""A toy language model over real pages, whose laws are a small world's tables."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from specdec.certificates.worlds import World
from specdec.interfaces import ForwardResult
from specdec.kv_cache import KVCache, LayerShape
from specdec.model import Segment
from specdec.pages import PagePool


class WrongContextError(AssertionError):
    """A token of the toy model sees other tokens, or other positions, than those of its own context."""


class ToyModel:
    """A language model over real pages whose only key is the token itself, so its law is that of the very tokens it sees.

    The first token of a sequence names the kind of the world's laws. Stands in for PagedModel, as target or as draft.
    Raises WrongContextError where a token sees slots that were never written, or positions other than 0, 1, ..., its own.
    """

    device = torch.device("cpu")
    dtype = torch.float64
    tokenizer = None
    max_positions: int | None = None
    eos_token_ids: frozenset[int] = frozenset()

    def __init__(self, world: World, laws_KCV: Tensor, name: str = "toy") -> None:
        self.name, self.vocab_size = name, world.vocab_size
        self._logits_KCV, self._next = laws_KCV.log(), world.next_CV.tolist()

    def new_cache(self, pool: PagePool) -> KVCache:
        return KVCache(pool, [LayerShape(1, 1, 1)], self.dtype, self.device)

    def forward(
        self, segments: Seq[Segment], cache: KVCache, wanted_rows: Tensor | None = None, hidden_layers: Seq[int] = ()
    ) -> ForwardResult:
        keys = cache.layer(0)[0][:, 0, 0]
        layouts, new = [], list[int]()
        for segment in segments:
            own = segment.positions_Q.tolist()
            tail = own if segment.tail_positions_M is None else segment.tail_positions_M.tolist()
            slots = [segment.table.slot(position) for position in range(segment.visible_len + len(tail))]
            new += slots[len(slots) - len(own) :]
            layouts.append((segment, slots, own, [*range(segment.visible_len), *tail]))
        # One more than the token, so that 0 is a slot that nobody has written.
        keys[new] = torch.cat([segment.token_ids_Q for segment in segments]).double() + 1
        written = keys.long().tolist()
        kinds, states = [], []
        for segment, slots, own, positions in layouts:
            mask = None if segment.tail_mask_QM is None else segment.tail_mask_QM.tolist()
            for query, position in enumerate(own):
                end = len(slots) - len(own) + query + 1
                if mask is None:
                    seen = [*range(end)]
                else:
                    seen = [i for i in range(end) if i < segment.visible_len or mask[query][i - segment.visible_len]]
                    if any(mask[query][end - segment.visible_len :]):
                        raise WrongContextError("a token sees one behind it")
                    seen.sort(key=positions.__getitem__)
                at = [positions[i] for i in seen]
                if at != [*range(position + 1)]:
                    raise WrongContextError(f"a token at position {position} sees positions {at}")
                tokens = [written[slots[i]] - 1 for i in seen]
                if min(tokens) < 0:
                    raise WrongContextError("a slot was read that nobody has written")
                state = 0
                for token in tokens[1:]:
                    state = self._next[state][token]
                kinds.append(tokens[0])
                states.append(state)
        rows = torch.arange(len(states)) if wanted_rows is None else wanted_rows
        return ForwardResult(self._logits_KCV[torch.tensor(kinds)[rows], torch.tensor(states)[rows]], {})
