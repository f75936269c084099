"""The target's law by the book: sampling parameters in plain Python, and what plain decoding emits, without an engine.

Nothing here is shared with `specdec.sampling`, so a mistake there cannot hide in what it is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Seq

from specdec.certificates.oracle import TokenSpan
from specdec.certificates.worlds import World
from specdec.sampling import SamplingParams


def processed_law(law: Seq[float], params: SamplingParams, prompt: Seq[int], output: Seq[int]) -> list[float]:
    """The law of the next token behind `prompt` and `output`, in the order that `SamplingParams` names."""
    scores = [math.log(p) if p > 0 else -math.inf for p in law]
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    for token in {*prompt, *output}:
        scores[token] *= params.repetition_penalty if scores[token] < 0 else 1 / params.repetition_penalty
    for token in set(output):
        scores[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    if params.temperature == 0:
        return [float(token == scores.index(max(scores))) for token in range(len(scores))]
    best = max(scores)
    weights = [math.exp((score - best) / params.temperature) for score in scores]
    # The smallest of the k largest stays, and so does what equals it.
    weights = [w if not params.top_k or sum(o > w for o in weights) < params.top_k else 0.0 for w in weights]
    total = sum(weights)
    # A token stays while those likelier than it hold less than top_p.
    kept = [sum(o for o in weights if o > w) < params.top_p * total and w >= params.min_p for w in weights]
    weights = [w if keep else 0.0 for w, keep in zip(weights, kept, strict=True)]
    return [w / sum(weights) for w in weights]


def plain_outputs(world: World, prompt: Seq[int], params: SamplingParams) -> dict[tuple[TokenSpan, str], float]:
    """The law of plain decoding's outputs with their finish reasons; a prompt's first token names the kind of laws."""

    def outputs(state: int, output: TokenSpan, prob: float) -> Iterator[tuple[tuple[TokenSpan, str], float]]:
        if output and output[-1] in params.stop_token_ids:
            yield (output, "stop"), prob
        elif len(output) == params.max_new_tokens:
            yield (output, "length"), prob
        else:
            law = world.target_KCV[prompt[0], state].tolist()
            for token, p in enumerate(processed_law(law, params, prompt, output)):
                if p > 0:
                    yield from outputs(int(world.next_CV[state, token]), (*output, token), prob * p)

    return dict(outputs(world.walk(prompt[1:]), (), 1.0))
