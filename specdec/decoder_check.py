"""Proof, at load, that the quick way through a model computes what transformers' layers compute."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from specdec.kv_cache import KVCache
from specdec.model import PagedModel, Segment
from specdec.pages import PagePool, PageTable
from specdec.passed import record_of, remember
from specdec.tree import TokenTree

# Mean difference of the logits in units of their standard deviation. Rounding to bfloat16 stays below 0.02; what is left out
# or computed otherwise shows by 0.2 and more.
TOLERANCE = 0.06
_SOURCES = ("attention", "decoder", "decoder_check", "kv_cache", "model", "packing")
_PARENTS = [-1, 0, 0, 1, 2, 2, 4, 6]
_SEED = 0


def check_decoder(model: PagedModel) -> None:
    """Compares both ways on a prompt and a tree behind it; a pass is remembered on disk.

    Where they differ, the model goes layer by layer from now on, and a warning says so.
    """
    if not model.is_fused:
        return
    record = record_of(model, "decoder", _SOURCES, torch.backends.cpu.get_cpu_capability())
    if record is not None and record.is_file():
        return
    quick = _logits(model)
    with model.layer_by_layer():
        wanted = _logits(model)
    error = float((quick - wanted).abs().mean() / wanted.std())
    # Written so that nan is no pass.
    if not error < TOLERANCE:
        model.drop_decoder()
        warnings.warn(
            f"{model.name}: its layers in one call differ from transformers' by {error:.1e} of the logits' spread "
            f"({TOLERANCE} allowed), so it runs layer by layer, which is slower; please report it",
            stacklevel=2,
        )
        return
    remember(record, model, error=error)


def _logits(model: PagedModel) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    length = 200 if model.max_positions is None else min(200, model.max_positions - len(_PARENTS))
    ids = torch.randint(
        min(3, model.vocab_size - 1), max(model.vocab_size * 9 // 10, 4), (length + len(_PARENTS),), generator=generator
    )
    # Children of one node must differ, also in the smallest vocabulary.
    ids[length:] = torch.arange(len(_PARENTS)) % model.vocab_size
    pool = PagePool(num_pages=length // 16 + 3, page_size=16)
    table, cache = PageTable(pool), model.new_cache(pool)
    table.reserve(length + len(_PARENTS), 0)
    try:
        return torch.cat([_run(model, cache, table, ids[:length]), _run(model, cache, table, ids[length:], length)])
    finally:
        cache.release()


def _run(model: PagedModel, cache: KVCache, table: PageTable, ids: Tensor, start: int | None = None) -> Tensor:
    if start is None:
        segment = Segment(table, 0, ids, torch.arange(len(ids)))
    else:
        tree = TokenTree.from_parents(ids[None], torch.tensor([_PARENTS]))
        segment = Segment(table, start, ids, start + tree.depth_BN[0], tree.ancestors_BNN[0])
    return model.forward([segment], cache).logits_RV.float()
