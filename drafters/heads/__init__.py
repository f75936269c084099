"""Networks that draft from the target's own hidden states; training and serving run the same modules."""

from specdec.drafters.heads.eagle import Attend, EagleConfig, EagleHead
from specdec.drafters.heads.medusa import MedusaConfig, MedusaHeads

__all__ = ["Attend", "EagleConfig", "EagleHead", "MedusaConfig", "MedusaHeads"]
