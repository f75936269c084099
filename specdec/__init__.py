"""Speculative decoding whose output is exactly the target's: trees of drafted tokens, one forward, paged KV cache."""

from specdec.engine import Engine
from specdec.handle import Handle
from specdec.model import PagedModel
from specdec.request import Result, Token
from specdec.sampling import SamplingParams

__version__ = "0.1.0"

__all__ = ["Engine", "Handle", "PagedModel", "Result", "SamplingParams", "Token"]
