"""Sampling and acceptance kernels against their eager references, on the device at hand: part of `gpu_check`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.drafters.growth import GrowingPolicy, Static
from specdec.drafters.sampled import Mixed, Sampled, chain
from specdec.experiments.kernel_check import DTYPES, FLOOR, MULTIPLE, Check, Sizes, error, kind_of, named
from specdec.kernels import acceptance, sampling
from specdec.kernels.acceptance import AcceptedPath
from specdec.kernels.acceptance.reference import follow_reference, rejection_reference, traversal_reference
from specdec.kernels.sampling.reference import draw_reference, laws_reference
from specdec.noise import CounterNoise, GumbelKey, PositionKey, RoundKey
from specdec.sampling import BatchSampling, ModelLaws, SamplingParams
from specdec.tree import TokenTree
from specdec.verifiers import on_device

# Sums are taken in another order, so a number may fall on the other side of a border that it lies within rounding of.
_MOST_DIFFERING = 0.01
_PARAMS = [
    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature in (0.0, 0.7, 1.3)
    for top_k in (0, 1, 40)
    for top_p in (1.0, 0.8)
    for min_p in (0.0, 0.05)
]


def check_sampling(device: torch.device, sizes: Sizes) -> list[Check]:
    """Laws, draws from given laws, and both in one, under every combination of parameters, from logits as models give them."""
    return [check for dtype in DTYPES for check in _sampling(dtype, device, sizes)]


def _sampling(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> list[Check]:
    rows, vocab = sizes.rows, sizes.vocab
    params = [_PARAMS[row % len(_PARAMS)] for row in range(rows)]
    batch = BatchSampling(params, [[]] * rows, [[]] * rows, vocab, device)
    scores_RV = 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    at_R, noise = torch.arange(rows, device=device), _noise(rows, device)
    kind = kind_of(scores_RV)
    columns = [
        column[:, None]
        for column in (
            batch.row_params.temperature_R,
            batch.row_params.top_k_R,
            batch.row_params.top_p_R,
            batch.row_params.min_p_R,
        )
    ]
    own_RV = laws_reference(scores_RV.float(), *(column.float() for column in columns))
    truth_RV = laws_reference(scores_RV.double(), *(column.double() for column in columns))
    found_RV = sampling.laws(scores_RV, batch.row_params)
    worst, eager = error(found_RV, truth_RV), error(own_RV, truth_RV)
    detail = f"{kind}: error {worst:.1e}, of the eager reference {eager:.1e}"
    checks = [Check(f"sampling laws, {named(dtype)}", worst <= MULTIPLE * eager + FLOOR, detail)]
    for key in (PositionKey(1), GumbelKey(1), RoundKey("residual", at_R)):
        keys = noise.keys(key, at_R)
        wanted_R = draw_reference(own_RV, keys)
        drawn = int((sampling.draw(own_RV, keys) != wanted_R).sum())
        # The same numbers and the same weights: integers leave no room for rounding.
        name = f"{type(key).__name__}, {named(dtype)}"
        checks.append(Check(f"sampling draw, {name}", drawn == 0, f"{kind}: {drawn} of {rows} tokens differ"))
        tokens_R = sampling.sample(scores_RV, batch.row_params, keys)
        differing = int((tokens_R != wanted_R).sum())
        impossible = int((own_RV.gather(1, tokens_R[:, None]) <= 0).sum())
        passed = differing <= _MOST_DIFFERING * rows and impossible <= differing
        detail = f"{kind}: {differing} of {rows} tokens differ, {impossible} are none of the reference's law"
        checks.append(Check(f"sampling sample, {name}", passed, detail))
    return checks


def check_acceptance(device: torch.device, sizes: Sizes) -> list[Check]:
    """Each walk down trees of each kind of draw that its rule takes."""
    fixed, iid, without = Static([[0], [1], [0, 0], [1, 0]]), Sampled([3, 2]), Sampled([3, 2], "without_replacement")
    cases: list[tuple[str, str, GrowingPolicy]] = [
        ("follow", "fixed", fixed),
        ("follow", "iid", iid),
        ("rejection", "fixed chain", chain(4)),
        ("rejection", "iid chain", chain(4, "iid")),
        ("traversal", "fixed", fixed),
        ("traversal", "iid", iid),
        ("traversal", "without replacement", without),
        ("traversal", "mixed", Mixed([3, 2])),
    ]
    return [_walk(rule, kind, policy, device, sizes) for rule, kind, policy in cases]


def _walk(rule: str, kind: str, policy: GrowingPolicy, device: torch.device, sizes: Sizes) -> Check:
    rows, noise = sizes.rows, _noise(sizes.rows, device)
    draft = _Round(rows, sizes.vocab, policy.max_depth, device)
    tree = policy.grow(draft, noise).tree
    # Close to the drafted laws, so that paths of every length occur.
    logits_TV = draft.logits(tree)
    params = [SamplingParams(temperature=1.0)] * rows
    laws = ModelLaws(logits_TV, tree, BatchSampling(params, [[]] * rows, [[]] * rows, sizes.vocab, device))
    if rule == "follow":
        every_T = torch.arange(len(logits_TV), device=device)
        rows_T = torch.repeat_interleave(torch.arange(rows, device=device), tree.num_nodes_B)
        depths_T = tree.depth_BN[rows_T, every_T - laws.first_B[rows_T]]
        drawn_T = draw_reference(laws.packed(), noise.keys(PositionKey(depths_T), rows_T))
        arguments = tree.tokens_BN, tree.parents_BN, drawn_T, laws.first_B
        found, wanted = acceptance.follow(*arguments), follow_reference(*arguments)
    else:
        given = on_device.sampled(tree), laws.packed(), laws.first_B, on_device.coins(noise)
        op, reference = {
            "rejection": (acceptance.rejection, rejection_reference),
            "traversal": (acceptance.traversal, traversal_reference),
        }[rule]
        found, wanted = op(*given), reference(*given)
    differing, accepted = _differing(found, wanted), int(wanted.num_accepted_B.sum())
    # A walk that never gets anywhere would say nothing.
    passed = differing <= _MOST_DIFFERING * rows and accepted > 0
    detail = f"{kind_of(logits_TV)}: {differing} of {rows} verdicts differ, {accepted} accepted"
    return Check(f"acceptance {rule}, {kind}", passed, detail)


def _differing(found: AcceptedPath, wanted: AcceptedPath) -> int:
    same_B = (found.path_BN == wanted.path_BN).all(1) & (found.next_token_B == wanted.next_token_B)
    return int((~(same_B & (found.num_accepted_B == wanted.num_accepted_B))).sum())


def _noise(rows: int, device: torch.device) -> CounterNoise:
    return CounterNoise([7919 * row + 5 for row in range(rows)], range(rows), range(3, 3 + rows), device)


class _Round:
    """A round of a drafter whose law behind each node is one of some, by the node's token alone."""

    def __init__(self, rows: int, vocab: int, depth: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(4)
        self._draft_KV, self._noise_KV = (4 * torch.randn(16, vocab, generator=generator).to(device) for _ in range(2))
        self.roots_B = torch.randint(vocab, (rows,), generator=generator).to(device)
        # Ragged: some rows may not go as deep as others.
        self.limits = [depth - row % 2 if depth > 1 else depth for row in range(rows)]
        self.vocab_size = vocab

    def expand_root(self) -> _Next:
        return _Next(self._draft_KV[self.roots_B % 16][:, None].softmax(-1))

    def expand(self, tokens_BW: Tensor, parents_BW: Tensor, depth: int) -> _Next:
        return _Next(self._draft_KV[tokens_BW % 16].softmax(-1))

    def logits(self, tree: TokenTree) -> Tensor:
        """The target's [T, V], nodes behind one another."""
        tokens_T = tree.tokens_BN[tree.is_node_BN] % 16
        return self._draft_KV[tokens_T] + 0.1 * self._noise_KV[tokens_T]


@dataclass
class _Next:
    laws_BWV: Tensor

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        best = self.laws_BWV.log().topk(k)
        return best.indices, best.values

    def laws(self, paths_BWK: Tensor) -> Tensor:
        return self.laws_BWV
