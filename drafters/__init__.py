"""Drafters, and the policies by which their trees grow."""

from specdec.drafters.choices import static
from specdec.drafters.coupled import Coupled
from specdec.drafters.eagle import EagleDrafter
from specdec.drafters.growth import Static, TopK
from specdec.drafters.medusa import MedusaDrafter
from specdec.drafters.ngram import NGramDrafter
from specdec.drafters.sampled import Mixed, Sampled, chain
from specdec.drafters.small_model import SmallModelDrafter
from specdec.drafters.union import UnionDrafter

__all__ = [
    "Coupled",
    "EagleDrafter",
    "MedusaDrafter",
    "Mixed",
    "NGramDrafter",
    "Sampled",
    "SmallModelDrafter",
    "Static",
    "TopK",
    "UnionDrafter",
    "chain",
    "static",
]
