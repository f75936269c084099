"""Which trees are worth their time: the choice before drafting, and which of the drafted nodes to keep."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specdec.cost import Array, CostModel

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Options:
    """What speculating promises each of B rows: for depth d (0: not at all) under option o the expected number of accepted
    tokens `gain_BDO`, and of nodes to verify `nodes_BDO`, the root not counted.

    `price_O` is what one more node must earn for option o to want it. `expanded_D` nodes are run to draft to depth d,
    `caught_up_B` final tokens first. Depths beyond `limits_B` are of no use to a row.
    """

    gain_BDO: Array
    nodes_BDO: Array
    price_O: Array
    expanded_D: Array
    caught_up_B: Array
    limits_B: Ints


@dataclass(frozen=True)
class Load:
    """A step as it is without drafted nodes: packed tokens (`num_prompt` of them prompts'), sequences, the tokens before
    them, and how many sequences emit."""

    num_rows: int
    num_sequences: int
    context: int
    num_prompt: int = 0
    num_emitting: int = 0


@dataclass(frozen=True)
class Choice:
    """Depths per row and the option, the tokens and seconds expected of the step, and what a token is worth: `rate` tokens per
    second are what steps without prompts bring."""

    depths_B: Ints
    option: int
    tokens: float
    seconds: float
    rate: float

    @property
    def value(self) -> float:
        """Tokens won, less those that the time would have brought elsewhere."""
        return self.tokens - self.rate * self.seconds


def choose(options: Options, load: Load, costs: CostModel, margin: float = 0.01) -> Choice:
    """The depths and option with the most tokens for their time, over the whole batch.

    For every option and every cap on the depth each row takes what is best at the option's prices; these assignments, plain
    decoding among them, are then compared by what they cost exactly. So prices only order candidates, and kinks of the cost
    (a forward that costs the same up to 8 rows) are met. The best must beat plain decoding by `margin`.
    """
    depths_BCO = _assignments(options, load, costs)
    gain_CO = np.take_along_axis(options.gain_BDO, depths_BCO, 1).sum(0)
    nodes_CO = np.take_along_axis(options.nodes_BDO, depths_BCO, 1).sum(0)
    draft_CO = _draft_s(options, depths_BCO, costs)
    tokens_CO = load.num_emitting + gain_CO
    # An accepted token saves a later step's time, and later steps have no prompts: prompts must not make time look cheap.
    bare_rows = load.num_rows - load.num_prompt
    seconds_CO = costs.step_s(bare_rows + nodes_CO, load.num_sequences, load.context) + draft_CO
    rate_CO = tokens_CO / seconds_CO
    rate, plain_rate = float(rate_CO.max()), float(rate_CO[0, 0])
    if load.num_prompt:
        seconds_CO = costs.step_s(load.num_rows + nodes_CO, load.num_sequences, load.context) + draft_CO
    value_CO = tokens_CO - rate * seconds_CO
    cap, option = divmod(int(value_CO.argmax()), value_CO.shape[1])
    # Cap 0 is plain decoding.
    if value_CO[cap, option] - value_CO[0, 0] <= margin * tokens_CO[0, 0]:
        cap, option, rate = 0, 0, plain_rate
    tokens, seconds = float(tokens_CO[cap, option]), float(seconds_CO[cap, option])
    return Choice(depths_BCO[:, cap, option], option, tokens, seconds, rate)


def instead(options: Options, load: Load, costs: CostModel, choice: Choice, depths_B: Ints, option: int) -> Choice:
    """The same step with other depths, valued at the same rate."""
    rows = np.arange(len(depths_B))
    nodes = options.nodes_BDO[rows, depths_B, option].sum()
    seconds = costs.step_s(load.num_rows + nodes, load.num_sequences, load.context)
    seconds = seconds + _draft_s(options, depths_B, costs)
    tokens = load.num_emitting + float(options.gain_BDO[rows, depths_B, option].sum())
    return Choice(depths_B, option, tokens, float(seconds), choice.rate)


def keep_best(probs_BN: Array, load: Load, costs: CostModel, rate: float) -> NDArray[np.bool_]:
    """Which drafted nodes [B, N] are worth verifying, over the whole batch, where each is accepted with `probs_BN` (0 at roots
    and padding) and a second is worth `rate` tokens.

    The likeliest nodes come first, so a parent before its children, which are never likelier; how many of them is decided by
    the exact cost of every number.
    """
    flat = probs_BN.ravel()
    order = (-flat).argsort(kind="stable")
    count = int((flat > 0).sum())
    gain = np.concatenate([[0.0], flat[order[:count]].cumsum()])
    value = gain - rate * costs.step_s(load.num_rows + np.arange(count + 1.0), load.num_sequences, load.context)
    keep = np.zeros(flat.shape, dtype=bool)
    keep[order[: int(value.argmax())]] = True
    return keep.reshape(probs_BN.shape)


def _assignments(options: Options, load: Load, costs: CostModel) -> Ints:
    """The depths [B, C, O] that each row takes under cap c at option o's prices."""
    size = options.gain_BDO.shape[1]
    # A node to draft is paid at the price of a node to verify, in the proportion of what one more of each costs.
    low, high = costs.step_s(load.num_rows + np.array([0.0, 8.0]), load.num_sequences, load.context)
    row_s = max((high - low) / 8, 1e-3 * high / max(load.num_rows, 1))
    first_s, node_s, token_s = costs.draft_s(np.ones(3), np.array([0.0, 1.0, 0.0]), np.array([0.0, 0.0, 1.0]))
    node_share, token_share = (min((more - first_s) / row_s, 4.0) for more in (node_s, token_s))
    depths_D = np.arange(size)
    caught_up_BD = token_share * options.caught_up_B[:, None] * (depths_D > 0)
    work_BD = node_share * options.expanded_D + caught_up_BD
    score = options.gain_BDO - options.price_O * (options.nodes_BDO + work_BD[..., None])
    score[depths_D > options.limits_B[:, None]] = -np.inf
    # The first of equals: the shallowest.
    best = np.maximum.accumulate(score, 1)
    is_new = score[:, 1:] > best[:, :-1]
    at = np.concatenate([np.zeros_like(score[:, :1], dtype=np.int64), is_new * depths_D[1:, None]], 1)
    return np.maximum.accumulate(at, 1)


def _draft_s(options: Options, depths: Ints, costs: CostModel) -> Array:
    """Seconds of drafting to `depths`, whose first axis is the rows."""
    caught_up = np.tensordot(options.caught_up_B, depths > 0, 1)
    return costs.draft_s(depths.max(0), options.expanded_D[depths].sum(0), caught_up)
