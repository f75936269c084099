"""What transformers needs to read GGUF files in seconds rather than most of a minute."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np


def require_gguf() -> None:
    """Raises ValueError with the command to run where the package gguf is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("reading a GGUF file needs the package gguf (extra specdec[demo]); run: pip install gguf")


def has_tokenizer(path: str) -> bool:
    """Whether a GGUF file brings its vocabulary; nearly all do."""
    import gguf

    return "tokenizer.ggml.tokens" in gguf.GGUFReader(path).fields


@contextmanager
def fast_gguf() -> Iterator[None]:
    """While it is open, a GGUF file's header is parsed once, and the map of tensor names is built once.

    Transformers parses the header anew for config, weights and tokenizer, and builds the map anew for every submodule
    of the model; SmolLM2-135M took 44 s to load, of which 35 s were repetitions.
    """
    import gguf

    class ArrayReader(gguf.GGUFReader):
        """Slices a plain array: a memmap builds a Python object with attributes for each of 10^5 strings."""

        data: Any

        def _get(self, *args: Any, **kwargs: Any) -> Any:
            if type(self.data) is np.memmap:
                self.data = self.data.view(np.ndarray)
            return super()._get(*args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(_replaced(gguf, "GGUFReader", functools.cache(ArrayReader)))
        stack.enter_context(_replaced(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)))
        with suppress(ImportError, AttributeError):
            from transformers import modeling_gguf_pytorch_utils as reading

            # Unlike transformers' own bars this one obeys no setting; on a terminal it stays, and goes when done.
            bar = functools.partial(reading.tqdm, disable=None, leave=False)
            stack.enter_context(_replaced(reading, "tqdm", bar))
        yield


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
