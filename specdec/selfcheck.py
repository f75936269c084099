"""Self-check: attention over pages gives what the model's own attention gives, or the model is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.attention import ATTENTION_NAME, UnsupportedModelError
from specdec.model import PagedModel, Segment
from specdec.pages import PagePool, PageTable
from specdec.passed import record_of, remember
from specdec.reduction import SEED, attention_reaches, reduced_copies
from specdec.tree import TokenTree

# In units of the logits' standard deviation. Float32 rounding stays near 1e-5 (Gemma-3n: 1e-3); every fault that the
# tests plant is above 0.3.
TOLERANCE = 3e-4
_SOURCES = ("attention", "kv_cache", "model", "reduction", "selfcheck")
_PROMPT_LENS = (17, 9)
_TREES = ([-1, 0, 0, 0, 1, 1, 2, 4, 4, 7], [-1, 0, 1, 1, 2, 0, 5, 6])
_ACCEPTED = [0, 1, 5]

Path_ = tuple[int, ...]


def self_check(model: PagedModel) -> None:
    """Makes certain that attention over pages is exact for this architecture; a pass is remembered on disk.

    A reduced random copy in float32 runs prompt chunks and ragged trees of two sequences over scattered pages, and plain
    transformers runs every node's own path. Where no copy can be made the loaded model itself is compared, within the
    noise between its own attention functions. Raises UnsupportedModelError on a deviation, or if nothing can be compared.
    """
    record = record_of(model, "self_check", _SOURCES)
    if record is not None and record.is_file():
        return
    copies = iter(reduced_copies(model.model))
    with _exact_and_alone():
        copied = next((small for small in copies if _runs(small)), None)
        if copied is None:
            _check_itself(model)
        else:
            _check_copy(model, copied)
    remember(record, model)


def _check_copy(model: PagedModel, small: PreTrainedModel) -> None:
    worst, allowed = _compare(PagedModel(small, name=model.name), TOLERANCE)
    if worst > allowed and (again := next((c for c in reduced_copies(model.model, SEED + 1) if _runs(c)), None)):
        # Rounding can flip a hard choice inside a model (routing); a wrong attention is wrong for every seed.
        worst, allowed = _compare(PagedModel(again, name=model.name), TOLERANCE)
    if worst > allowed:
        raise _refusal(model, worst, f"in a reduced random copy, {allowed:.0e} allowed")


def _check_itself(model: PagedModel) -> None:
    """Compares the loaded model in its own dtype; sound only where the short prompts reach past every window."""
    reaches = attention_reaches(model.model.config.get_text_config(decoder=True))
    too_far = {name: reach for name, reach in reaches.items() if reach >= max(_PROMPT_LENS)}
    if too_far or not _runs(model.model):
        reason = f"its attention is bounded ({too_far})" if too_far else "its own attention does not run"
        raise UnsupportedModelError(
            f"{model.name}: {type(model.model).__name__} cannot be checked: no reduced copy can be built and {reason}; "
            f"it is refused rather than run wrong (self_check=False runs it at your own risk)"
        )
    worst, allowed = _compare(model, 4 * torch.finfo(model.dtype).eps)
    if worst > allowed:
        raise _refusal(model, worst, f"{allowed:.0e} allowed by its own noise")


def _refusal(model: PagedModel, worst: float, allowed: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{model.name}: attention over pages differs from {type(model.model).__name__}'s own by {worst:.1e} of its logits' "
        f"spread ({allowed}); the model is refused because its output would be wrong"
    )


def _compare(paged: PagedModel, tolerance: float) -> tuple[float, float]:
    """Worst difference from plain transformers over all packed tokens, inf for NaN, and what is allowed.

    Both in units of the logits' spread. Allowed is `tolerance` or, where the model's own rounding exceeds it, a small
    multiple of that.
    """
    model = paged.model
    try:
        paths, over_pages = _packed(paged)
    except UnsupportedModelError:
        raise
    except Exception as error:
        name = type(model).__name__
        raise UnsupportedModelError(f"{paged.name}: {name} cannot run over pages ({error})") from error
    with _restored(model):
        plain = _plain(model, paths, "eager")
        spread = float(plain.std())
        worst = _worst(over_pages, plain) / spread
        if worst <= tolerance:
            return worst, tolerance
        # A token alone on its path, and the same under another implementation: equal but for rounding.
        noise = _worst(torch.cat([_plain(model, [path], "eager") for path in paths]), plain) / spread
        with suppress(ValueError, ImportError):
            noise = max(noise, _worst(_plain(model, paths, "sdpa"), plain) / spread)
    return worst, max(tolerance, min(5 * noise, max(0.1, 32 * torch.finfo(paged.dtype).eps)))


def _worst(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max().nan_to_num(torch.inf, torch.inf))


def _runs(model: PreTrainedModel) -> bool:
    """Whether the model's own forward works and says something."""
    try:
        with _restored(model):
            logits = _plain(model, [(3, 4, 5, 6)], "eager")
    except Exception:  # any architecture may come here
        return False
    return bool(logits.isfinite().all()) and float(logits.std()) > 0


@torch.inference_mode()
def _plain(model: PreTrainedModel, paths: list[Path_], implementation: str) -> Tensor:
    """Float32 logits [len(paths), V] behind each path, by the model's own forward over the path alone."""
    model.set_attn_implementation(implementation)
    found: dict[Path_, Tensor] = {}
    for path in sorted(paths, key=len, reverse=True):
        if path not in found:
            ids = torch.tensor([path], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
            found |= {path[: i + 1]: row for i, row in enumerate(logits) if path[: i + 1] not in found}
    return torch.stack([found[path] for path in paths])


def _packed(model: PagedModel) -> tuple[list[Path_], Tensor]:
    """Every packed token's path of token ids, and its float32 logits over pages.

    Four forwards: prompt chunks of both sequences; the rest of the one prompt beside a tree on the other; after a commit
    trees on both, the first one's deeper nodes left out; and these alone, as a growing draft tree computes them.
    """
    generator = torch.Generator().manual_seed(SEED)

    def draw(count: int) -> list[int]:
        # Low ids may be special, the last ones placeholders.
        return (3 + torch.randperm(min(model.vocab_size, 64) - 8, generator=generator)[:count]).tolist()

    pool = PagePool(num_pages=32, page_size=4)
    cache = model.new_cache(pool)
    for layer in range(model.num_layers):
        for tensor in cache.layer(layer):
            tensor.fill_(torch.nan)
    long, short, between = PageTable(pool), PageTable(pool), PageTable(pool)
    for table, tokens in ((long, 6), (between, 5), (short, 7), (between, 20), (long, 30), (short, 30)):
        table.reserve(tokens, 0)
    a, b = (draw(count) for count in _PROMPT_LENS)
    paths: list[Path_] = []
    logits: list[Tensor] = []

    def run(*segments: Segment) -> None:
        logits.append(model.forward(segments, cache).logits_RV.float())

    def chunk(table: PageTable, prompt: list[int], start: int, stop: int) -> Segment:
        paths.extend(tuple(prompt[: i + 1]) for i in range(start, stop))
        return Segment(table, start, torch.tensor(prompt[start:stop]), torch.arange(start, stop))

    def tree(table: PageTable, prompt: list[int], tree: TokenTree, first: int, stop: int) -> Segment:
        tokens, start = tree.tokens_BN[0], len(prompt)
        paths.extend((*prompt, *tokens[tree.path(node)].tolist()) for node in range(first, stop))
        positions = start + tree.depth_BN[0, :stop]
        mask = tree.ancestors_BNN[0, first:stop, :stop]
        return Segment(table, start, tokens[first:stop], positions[first:], mask, positions)

    def new_tree(parents: list[int]) -> TokenTree:
        return TokenTree.from_parents(torch.tensor([draw(len(parents))]), torch.tensor([parents]))

    with torch.inference_mode():
        run(chunk(long, a, 0, 7), chunk(short, b, 0, len(b)))
        one = new_tree(_TREES[0])
        run(chunk(long, a, 7, len(a)), tree(short, b, one, 0, one.max_nodes))
        slots = [short.slot(len(b) + node) for node in _ACCEPTED]
        cache.move(slots, [short.slot(len(b) + depth) for depth in range(len(_ACCEPTED))])
        b += one.tokens_BN[0, _ACCEPTED].tolist()
        one, two = new_tree(_TREES[0]), new_tree(_TREES[1])
        run(tree(long, a, one, 0, 4), tree(short, b, two, 0, two.max_nodes))
        run(tree(long, a, one, 4, one.max_nodes))
    cache.release()
    return paths, torch.cat(logits)


@contextmanager
def _restored(model: PreTrainedModel) -> Iterator[None]:
    before = model.config.get_text_config(decoder=True)._attn_implementation
    try:
        yield
    finally:
        model.set_attn_implementation(before if before is not None else ATTENTION_NAME)


@contextmanager
def _exact_and_alone() -> Iterator[None]:
    """Float32 products without TF32, whose rounding is no fault of a model, on one thread.

    On a busy machine threads wait for one another at every one of these tiny products: seconds instead of milliseconds.
    """
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
