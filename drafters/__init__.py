"""Drafters, and the policies by which their trees grow."""

from specdec.drafters.coupled import Coupled
from specdec.drafters.growth import Static, TopK
from specdec.drafters.ngram import NGramDrafter
from specdec.drafters.sampled import Mixed, Sampled, chain
from specdec.drafters.small_model import SmallModelDrafter

__all__ = ["Coupled", "Mixed", "NGramDrafter", "Sampled", "SmallModelDrafter", "Static", "TopK", "chain"]
