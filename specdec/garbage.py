"""Python's garbage collector, kept from stopping everybody for what is there to stay."""

from __future__ import annotations

import gc


def set_aside() -> None:
    """Collects once, and from then on leaves out what is left: modules and models, a million objects that a full collection
    would look through again, in the middle of anybody's tokens, for a quarter of a second.

    It is for processes that serve from now on. A later call looks through all of it once more.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
