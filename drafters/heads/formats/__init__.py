"""Learned heads in the formats of Medusa, EAGLE, vLLM and speculators, and in our own."""

from specdec.drafters.heads.formats.description import Head, HeadConfig, Target
from specdec.drafters.heads.formats.files import FORMATS, export_head, load_head, save_head
from specdec.drafters.heads.formats.report import HeadReport, inspect_head

__all__ = [
    "FORMATS",
    "Head",
    "HeadConfig",
    "HeadReport",
    "Target",
    "export_head",
    "inspect_head",
    "load_head",
    "save_head",
]
