"""Which trees are worth their time: the choice before drafting, and which of the drafted nodes to keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.cost import CostModel


@dataclass(frozen=True)
class Options:
    """What speculating promises each of B rows: for depth d (0: not at all) under option o the expected number of accepted
    tokens `gain_BDO`, and of nodes to verify `nodes_BDO`, the root not counted.

    `price_O` is what one more node must earn for option o to want it. `expanded_D` nodes are run to draft to depth d,
    `caught_up_B` final tokens first. Depths beyond `limits_B` are of no use to a row.
    """

    gain_BDO: Tensor
    nodes_BDO: Tensor
    price_O: Tensor
    expanded_D: Tensor
    caught_up_B: Tensor
    limits_B: Tensor


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

    depths_B: Tensor
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
    gain_CO = options.gain_BDO.gather(1, depths_BCO).sum(0)
    nodes_CO = options.nodes_BDO.gather(1, depths_BCO).sum(0)
    draft_CO = _draft_s(options, depths_BCO, costs)
    tokens_CO = load.num_emitting + gain_CO
    # An accepted token saves a later step's time, and later steps have no prompts: prompts must not make time look cheap.
    bare_rows = load.num_rows - load.num_prompt
    bare_s = costs.step_s(bare_rows + nodes_CO, load.num_sequences, load.context) + draft_CO
    rate_CO = tokens_CO / bare_s
    # Cap 0 is plain decoding.
    plain_rate = float(rate_CO[0, 0])
    rate = max(float(rate_CO.max()), plain_rate)
    seconds_CO = bare_s
    if load.num_prompt:
        seconds_CO = costs.step_s(load.num_rows + nodes_CO, load.num_sequences, load.context) + draft_CO
    value_CO = tokens_CO - rate * seconds_CO
    best = int(value_CO.argmax())
    cap, option = divmod(best, value_CO.shape[1])
    gained = float(value_CO[cap, option] - value_CO[0, 0])
    if gained <= margin * float(tokens_CO[0, 0]):
        cap, option, rate = 0, 0, plain_rate
    return Choice(
        depths_BCO[:, cap, option], option, float(tokens_CO[cap, option]), float(seconds_CO[cap, option]), rate
    )


def instead(options: Options, load: Load, costs: CostModel, choice: Choice, depths_B: Tensor, option: int) -> Choice:
    """The same step with other depths, valued at the same rate."""
    at = depths_B[:, None]
    gain = float(options.gain_BDO[..., option].gather(1, at).sum())
    nodes = options.nodes_BDO[..., option].gather(1, at).sum()[None]
    seconds = costs.step_s(load.num_rows + nodes, load.num_sequences, load.context)
    seconds = seconds + _draft_s(options, at[..., None], costs)[0]
    return Choice(depths_B, option, load.num_emitting + gain, float(seconds), choice.rate)


def keep_best(probs_BN: Tensor, load: Load, costs: CostModel, rate: float) -> Tensor:
    """Which drafted nodes [B, N] are worth verifying, over the whole batch, where each is accepted with `probs_BN` (0 at roots
    and padding) and a second is worth `rate` tokens.

    The likeliest nodes come first, so a parent before its children, which are never likelier; how many of them is decided by
    the exact cost of every number.
    """
    best = probs_BN.flatten().sort(descending=True, stable=True)
    count = int((best.values > 0).sum())
    rows = load.num_rows + torch.arange(count + 1, dtype=torch.float64)
    gain = torch.cat([torch.zeros(1, dtype=torch.float64), best.values[:count].cumsum(0)])
    value = gain - rate * costs.step_s(rows, load.num_sequences, load.context)
    kept = int(value.argmax())
    keep = torch.zeros(probs_BN.numel(), dtype=torch.bool)
    keep[best.indices[:kept]] = True
    return keep.view_as(probs_BN)


def _assignments(options: Options, load: Load, costs: CostModel) -> Tensor:
    """The depths [B, C, O] that each row takes under cap c at option o's prices."""
    batch, size, _ = options.gain_BDO.shape
    # A node to draft is paid at the price of a node to verify, in the proportion of what one more of each costs.
    at = load.num_rows + torch.tensor([0.0, 8.0], dtype=torch.float64)
    low, high = costs.step_s(at, load.num_sequences, load.context).tolist()
    row_s = max((high - low) / 8, 1e-3 * high / max(load.num_rows, 1))
    one, none = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    first_s = costs.draft_s(one, none, none)
    node_share = min(float(costs.draft_s(one, one, none) - first_s) / row_s, 4.0)
    token_share = min(float(costs.draft_s(one, none, one) - first_s) / row_s, 4.0)
    caught_up = torch.where(torch.arange(size) > 0, token_share * options.caught_up_B[:, None], 0.0)
    work_BD = node_share * options.expanded_D + caught_up
    score = options.gain_BDO - options.price_O * (options.nodes_BDO + work_BD[..., None])
    beyond_BD = torch.arange(size) > options.limits_B[:, None]
    score = score.masked_fill(beyond_BD[..., None], -torch.inf)
    # The first of equals: the shallowest.
    best = score.cummax(1).values
    is_new = torch.cat([torch.ones_like(score[:, :1], dtype=torch.bool), score[:, 1:] > best[:, :-1]], 1)
    return torch.where(is_new, torch.arange(size)[None, :, None], 0).cummax(1).values


def _draft_s(options: Options, depths_BCO: Tensor, costs: CostModel) -> Tensor:
    levels = depths_BCO.amax(0).double()
    nodes = options.expanded_D[depths_BCO].sum(0)
    caught_up = ((depths_BCO > 0) * options.caught_up_B[:, None, None]).sum(0)
    return costs.draft_s(levels, nodes, caught_up)
