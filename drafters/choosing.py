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
    tokens `gain_BDO`, and of nodes to verify `nodes_BDO`, the root not counted. What is drafted already is there at depth 0.

    `expanded_D` nodes are run to draft to depth d, `caught_up_B` final tokens first. Depths beyond `limits_B` are of no use to
    a row. What is caught up with serves later drafts, too: `share_B` of it is charged to this one.
    """

    gain_BDO: Array
    nodes_BDO: Array
    expanded_D: Array
    caught_up_B: Array
    limits_B: Ints
    share_B: Array | float = 1.0

    @property
    def charged_B(self) -> Array:
        """Of the root alone nothing is left for later."""
        return np.minimum(self.caught_up_B, 1 + (self.caught_up_B - 1) * self.share_B)


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

    For every option the rows' further levels are put in the order of what they bring for the work they make; every beginning
    of that order, under every cap on the depth, is then valued by its exact cost. So kinks of the cost (a forward that costs
    the same up to 16 rows) are met. The best must beat plain decoding, the empty beginning, by `margin`.
    """
    if len(options.limits_B) == 1:
        return _choose_one(options, load, costs, margin)
    order_OI, depth_OI, parts = _increments(options, _work(options, load, costs))
    size = options.gain_BDO.shape[1] - 1
    within_COI = depth_OI <= np.arange(1, size + 1)[:, None, None]
    gain, nodes, expanded, caught_up = (_beginnings(values * within_COI) for values in parts)
    gain += options.gain_BDO[:, 0].sum(0)[:, None]
    nodes += options.nodes_BDO[:, 0].sum(0)[:, None]
    levels = np.maximum.accumulate(_beginnings(depth_OI * within_COI, total=False), 2)
    draft_s = costs.draft_s(levels, expanded, caught_up)
    tokens = load.num_emitting + gain
    # An accepted token saves a later step's time, and later steps have no prompts: prompts must not make time look cheap.
    bare_rows = load.num_rows - load.num_prompt
    seconds = costs.step_s(bare_rows + nodes, load.num_sequences, load.context) + draft_s
    rates = tokens / seconds
    rate, plain_rate = float(rates.max()), float(rates[0, 0, 0])
    if load.num_prompt:
        seconds = costs.step_s(load.num_rows + nodes, load.num_sequences, load.context) + draft_s
    value = tokens - rate * seconds
    cap, option, count = (int(i) for i in np.unravel_index(int(value.argmax()), value.shape))
    if value[cap, option, count] - value[0, 0, 0] <= margin * load.num_emitting:
        cap, option, count, rate = 0, 0, 0, plain_rate
    taken = order_OI[option, :count][within_COI[cap, option, :count]]
    depths_B = np.bincount(taken // size, minlength=len(options.limits_B))
    at = cap, option, count
    return Choice(depths_B, option, float(tokens[at]), float(seconds[at]), rate)


def _choose_one(options: Options, load: Load, costs: CostModel, margin: float) -> Choice:
    """The same for a single row: every depth under every option is valued, and nothing has to be put in order."""
    levels = np.arange(options.limits_B[0] + 1.0)
    gain_DO, nodes_DO = options.gain_BDO[0, : len(levels)], options.nodes_BDO[0, : len(levels)]
    draft_D = costs.draft_s(levels, options.expanded_D[: len(levels)], np.where(levels > 0, options.charged_B[0], 0.0))
    tokens = load.num_emitting + gain_DO
    bare_rows = load.num_rows - load.num_prompt
    seconds = costs.step_s(bare_rows + nodes_DO, load.num_sequences, load.context) + draft_D[:, None]
    rates = tokens / seconds
    rate, plain_rate = float(rates.max()), float(rates[0, 0])
    if load.num_prompt:
        seconds = costs.step_s(load.num_rows + nodes_DO, load.num_sequences, load.context) + draft_D[:, None]
    value = tokens - rate * seconds
    depth, option = divmod(int(value.argmax()), value.shape[1])
    if value[depth, option] - value[0, 0] <= margin * load.num_emitting:
        depth, option, rate = 0, 0, plain_rate
    return Choice(np.array([depth]), option, float(tokens[depth, option]), float(seconds[depth, option]), rate)


def may_pay(limits_B: Ints, expanded_D: Array, load: Load, costs: CostModel, margin: float = 0.01) -> bool:
    """Whether drafts would beat plain decoding by `margin` if every drafted token were accepted: where not, nothing has to be
    known of them."""
    most = int(limits_B.max(initial=0))
    if not most:
        return False
    depths_D = np.arange(1.0, most + 1)
    num_rows = np.arange(1.0, (limits_B > 0).sum() + 1)[:, None]
    nodes = num_rows * depths_D
    draft_s = costs.draft_s(depths_D, num_rows * expanded_D[1 : most + 1], num_rows)
    bare_rows = load.num_rows - load.num_prompt
    plain_s = float(costs.step_s(np.array(float(bare_rows)), load.num_sequences, load.context))
    seconds = costs.step_s(bare_rows + nodes, load.num_sequences, load.context) + draft_s
    best = float(((load.num_emitting + nodes) / seconds).max())
    return best * plain_s > (1 + margin) * load.num_emitting


def instead(options: Options, load: Load, costs: CostModel, choice: Choice, depths_B: Ints, option: int) -> Choice:
    """The same step with other depths, valued at the same rate."""
    rows = np.arange(len(depths_B))
    nodes = options.nodes_BDO[rows, depths_B, option].sum()
    seconds = costs.step_s(load.num_rows + nodes, load.num_sequences, load.context)
    seconds = seconds + _draft_s(options, depths_B, costs)
    tokens = load.num_emitting + float(options.gain_BDO[rows, depths_B, option].sum())
    return Choice(depths_B, option, tokens, float(seconds), choice.rate)


def keep_best(
    probs_BN: Array, load: Load, costs: CostModel, rate: float | None, margin: float = 0.01
) -> NDArray[np.bool_]:
    """Which drafted nodes [B, N] are worth verifying, over the whole batch, where each is accepted with `probs_BN` (0 at roots
    and padding) and a second is worth `rate` tokens. None: nothing was chosen before, so a second is worth as many as the step
    itself brings at its best, which must be more than plain decoding by `margin`.

    The likeliest nodes come first, so a parent before its children, which are never likelier; how many of them is decided by
    the exact cost of every number.
    """
    flat = probs_BN.ravel()
    order = (-flat).argsort(kind="stable")
    count = int((flat > 0).sum())
    gain = np.concatenate([[0.0], flat[order[:count]].cumsum()])
    counts = np.arange(count + 1.0)
    seconds = costs.step_s(load.num_rows + counts, load.num_sequences, load.context)
    if rate is None:
        bare_s = costs.step_s(load.num_rows - load.num_prompt + counts, load.num_sequences, load.context)
        rates = (load.num_emitting + gain) / bare_s
        rate = float(rates.max())
        if rate <= (1 + margin) * rates[0]:
            return np.zeros(probs_BN.shape, dtype=bool)
    value = gain - rate * seconds
    keep = np.zeros(flat.shape, dtype=bool)
    keep[order[: int(value.argmax())]] = True
    return keep.reshape(probs_BN.shape)


def _work(options: Options, load: Load, costs: CostModel) -> Array:
    """What drafting one more level makes of work [B, D], counted in nodes to verify."""
    low, high = costs.step_s(load.num_rows + np.array([0.0, 8.0]), load.num_sequences, load.context)
    row_s = max((high - low) / 8, 1e-3 * high / max(load.num_rows, 1))
    first_s, node_s, token_s = costs.draft_s(np.ones(3), np.array([0.0, 1.0, 0.0]), np.array([0.0, 0.0, 1.0]))
    node_share, token_share = (min((more - first_s) / row_s, 4.0) for more in (node_s, token_s))
    work_BD = np.tile(node_share * np.diff(options.expanded_D), (len(options.limits_B), 1))
    work_BD[:, 0] += token_share * options.charged_B
    return work_BD


def _increments(options: Options, work_BD: Array) -> tuple[Ints, Ints, list[Array]]:
    """Every row's levels in the order in which each option wants them: their indices [O, I], depths, and what each adds of
    accepted tokens, nodes to verify, nodes to expand and tokens to catch up with."""
    gain_BDO, nodes_BDO = np.diff(options.gain_BDO, axis=1), np.diff(options.nodes_BDO, axis=1)
    batch, size, num = gain_BDO.shape
    depths_D = np.arange(1, size + 1)
    worth = gain_BDO / np.maximum(nodes_BDO + work_BD[..., None], 1e-9)
    # A level is never wanted before the one above it, nor where it is of no use.
    worth = np.minimum.accumulate(worth, 1)
    beyond_BD = depths_D > options.limits_B[:, None]
    order_OI = (-np.where(beyond_BD[..., None], -1.0, worth)).reshape(-1, num).T.argsort(1, kind="stable")
    caught_up_BD = options.charged_B[:, None] * (depths_D == 1)
    expanded_BD = np.tile(np.diff(options.expanded_D), (batch, 1))
    each = [np.broadcast_to(one[..., None], gain_BDO.shape) for one in (expanded_BD, caught_up_BD, beyond_BD)]
    useless_IO = each.pop().reshape(-1, num)
    parts = [
        np.take_along_axis(np.where(useless_IO, 0.0, one.reshape(-1, num)).T, order_OI, 1)
        for one in (gain_BDO, nodes_BDO, *each)
    ]
    usable_OI = np.take_along_axis(~useless_IO.T, order_OI, 1)
    # A level beyond a row's limit has a depth that no cap allows.
    return order_OI, np.where(usable_OI, depths_D[order_OI % size], size + 1), parts


def _beginnings(values: Array | Ints, total: bool = True) -> Array:
    """Sums of the first 0, 1, 2, ... along the last axis, or what stands there alone."""
    first = np.zeros((*values.shape[:-1], 1))
    return np.concatenate([first, values.cumsum(-1) if total else values], -1)


def _draft_s(options: Options, depths: Ints, costs: CostModel) -> Array:
    """Seconds of drafting to `depths`, whose first axis is the rows."""
    caught_up = np.tensordot(options.charged_B, depths > 0, 1)
    return costs.draft_s(depths.max(0), options.expanded_D[depths].sum(0), caught_up)
