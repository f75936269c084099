"""Average two EAGLE heads, one trained on from the other: often better than either (Wortsman et al. 2022, "Model soups").

    python -m specdec.experiments.average_heads FIRST SECOND OUTPUT [--share 0.5]

Takes checkpoints of any known format and writes our own; `share` is that of the second head, whose draft vocabulary stays.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch

from specdec.checkpoint import read_checkpoint
from specdec.drafters.heads import EagleHead
from specdec.drafters.heads.formats import load_head, save_head
from specdec.drafters.heads.formats.description import Options
from specdec.drafters.heads.formats.files import describe
from specdec.drafters.heads.frequencies import FILE, read_frequencies, save_frequencies
from specdec.drafters.training.initial import widened, with_vocabulary


def averaged(first: EagleHead, second: EagleHead, share: float = 0.5) -> EagleHead:
    """The head whose weights are `share` times the second's and the rest the first's; of tokens that the first does not know
    the second's alone. The second may also be wider inside. Raises ValueError for a share out of (0, 1), and for heads that
    differ in more."""
    if not 0 < share < 1:
        raise ValueError(f"share={share} must lie between 0 and 1")
    first = widened(with_vocabulary(first, second), second)
    if first.config != second.config:
        raise ValueError(f"heads of different shapes cannot be averaged: {first.config} and {second.config}")
    head, one, other = copy.deepcopy(second), first.state_dict(), second.state_dict()
    weights = {
        name: torch.lerp(one[name].float(), tensor.float(), share).to(tensor.dtype)
        for name, tensor in other.items()
        if tensor.is_floating_point()
    }
    head.load_state_dict(weights, strict=False)
    return head


def main(first: str, second: str, output: str, share: float = 0.5) -> None:
    """Writes the average, and beside it the token frequencies of the second where it has some."""
    heads = [load_head(path) for path in (first, second)]
    for path, head in zip((first, second), heads, strict=True):
        if not isinstance(head, EagleHead):
            raise ValueError(f"{path} holds {type(head).__name__}, and only EAGLE heads can be averaged")
    one, other = (head for head in heads if isinstance(head, EagleHead))
    source = read_checkpoint(second)
    save_head(averaged(one, other, share), output, base_model=describe(source, Options()).base_model)
    frequencies = source.files[0].parent / FILE
    if frequencies.is_file():
        save_frequencies(read_frequencies(frequencies, other.config.vocab_size), Path(output))
    print(f"{1 - share:g} x {first} + {share:g} x {second} in {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The average of two EAGLE heads, one trained on from the other.")
    for name in ("first", "second", "output"):
        parser.add_argument(name)
    parser.add_argument("--share", type=float, default=0.5)
    words = parser.parse_args()
    try:
        main(words.first, words.second, words.output, words.share)
    except (ValueError, OSError) as error:
        parser.error(str(error))
