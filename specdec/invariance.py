"""Whether a token's bits depend on its company: a text in one piece, in many, and as a tree's branch beside strangers."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.attention import UnsupportedModelError
from specdec.kv_cache import KVCache
from specdec.model import PagedModel, Segment
from specdec.packing import can_pack
from specdec.pages import PagePool, PageTable
from specdec.passed import record_of, remember
from specdec.tree import TokenTree

_SEED = 0
_SOURCES = ("attention", "decoder", "invariance", "kv_cache", "model", "packing")
# Of one row, of few, of what fills a block of oneDNN's or the attention's and a little more; past several tiles.
_CHUNKS = (40, 1, 2, 1, 3, 5, 16, 17, 33, 7, 200, 250, 1, 11, 1)
# A tree of 16 nodes; the nodes along `_PATH` hold the text's end.
_PARENTS = [-1, 0, 0, 0, 1, 2, 2, 3, 4, 6, 6, 7, 9, 10, 10, 12]
_PATH = [0, 2, 6, 10, 14]


def make_invariant(model: PagedModel) -> None:
    """Sets numerics=invariant: speculative and plain decoding then round alike, token for token.

    Proved on the spot, and a pass remembered on disk: all tokens of a text get the same logits, to the last bit, computed in
    one piece, in many, and at its end as a branch of a tree beside another sequence. The weights must be packed. Raises
    UnsupportedModelError, and leaves the model as it was, where it cannot be served so or fails.
    """
    if not can_pack(model.device, model.dtype):
        raise UnsupportedModelError(
            f"{model.name}: numerics=invariant is for bfloat16 on a CPU that multiplies it natively, not for "
            f"{str(model.dtype).removeprefix('torch.')} on {model.device.type}; use numerics=fast"
        )
    place = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    record = record_of(model, "invariant", _SOURCES, *place)
    model.set_numerics("invariant")
    if record is not None and record.is_file():
        return
    try:
        _check(model)
    except ValueError as error:
        model.set_numerics("fast")
        raise UnsupportedModelError(f"{model.name}: {error}; use numerics=fast") from error
    remember(record, model)


def _check(model: PagedModel) -> None:
    """Raises ValueError where a token's bits depend on its company, or attention cannot be computed so."""
    wanted, found = _alone_and_in_company(model)
    if differing := int((wanted != found).any(1).sum()):
        raise ValueError(
            f"{type(model.model).__name__} is not invariant: {differing} of {len(wanted)} tokens get other logits beside other "
            f"tokens"
        )


@torch.inference_mode()
def _alone_and_in_company(model: PagedModel) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(_SEED)

    def draw(count: int) -> Tensor:
        # Low ids may be special, the last ones placeholders.
        return torch.randint(
            min(3, model.vocab_size - 1), max(model.vocab_size * 9 // 10, 4), (count,), generator=generator
        )

    length = sum(_CHUNKS) + len(_PATH)
    if model.max_positions is not None:
        # The strangers' deepest node lies one position further.
        length = min(length, model.max_positions - 1)
    text, mate, nodes = draw(length), draw(29), draw(len(_PARENTS))
    pool = PagePool(num_pages=2 * (length // 16 + 3) + 4, page_size=16)
    cache = model.new_cache(pool)
    alone, pieces, other = (PageTable(pool) for _ in range(3))
    # Scattered pages for the text that goes in pieces.
    for table, tokens in ((alone, length), (pieces, 40), (other, len(mate)), (pieces, length + len(nodes))):
        table.reserve(tokens, 0)
    try:
        wanted = _run(model, cache, [_chunk(alone, text, 0)])
        start, found = 0, []
        for size in _CHUNKS:
            size = min(size, length - len(_PATH) - start)
            if size > 0:
                found.append(_run(model, cache, [_chunk(pieces, text[start : start + size], start)]))
                start += size
        nodes[_PATH] = text[start:]
        tree = TokenTree.from_parents(nodes[None], torch.tensor([_PARENTS]))
        positions = start + tree.depth_BN[0]
        branch = Segment(pieces, start, nodes, positions, tree.ancestors_BNN[0], positions)
        found.append(_run(model, cache, [_chunk(other, mate, 0), branch])[len(mate) :][_PATH])
    finally:
        cache.release()
    return wanted, torch.cat(found)


def _chunk(table: PageTable, tokens: Tensor, start: int) -> Segment:
    return Segment(table, start, tokens, torch.arange(start, start + len(tokens)))


def _run(model: PagedModel, cache: KVCache, segments: list[Segment]) -> Tensor:
    return model.forward(segments, cache).logits_RV
