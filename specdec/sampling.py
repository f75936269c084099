"""From logits to probabilities: the only place where that happens, for target and draft models alike."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.tree import TokenTree


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled; temperature 0 is the one-hot law of the largest logit.

    Applied in transformers' order: logit bias, repetition penalty (prompt and output, Keskar et al. 2019), presence and
    frequency penalty (output only, as OpenAI defines them), temperature, top-k (0: off), top-p, min-p. Equal
    probabilities at a cut are kept together, so a law never depends on how a sort breaks ties. `seed` None draws one from
    the operating system. `stop` strings end the text before themselves; `stop_token_ids` come on top of the model's own
    end-of-sequence ids, which `ignore_eos` switches off. `logprobs` n reports, per token, its log-probability and the n
    most likely alternatives under the model's unprocessed law. Raises ValueError naming the value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        checks = {
            # Logits over less than 1e-30 overflow float32, and a law of NaNs follows.
            "temperature": (
                self.temperature == 0 or 1e-30 <= self.temperature < math.inf,
                "0 or a finite number > 1e-30",
            ),
            "top_k": (self.top_k >= 0, "an integer >= 0 (0 switches it off)"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "repetition_penalty": (self.repetition_penalty > 0, "a number > 0"),
            "presence_penalty": (math.isfinite(self.presence_penalty), "a finite number"),
            "frequency_penalty": (math.isfinite(self.frequency_penalty), "a finite number"),
            "logit_bias": (
                all(t >= 0 and b < math.inf for t, b in self.logit_bias.items()),
                "token id -> number below inf",
            ),
            "max_new_tokens": (self.max_new_tokens >= 1, "an integer >= 1"),
            "stop": (all(self.stop), "non-empty strings"),
            "logprobs": (self.logprobs is None or self.logprobs >= 0, "None or an integer >= 0"),
        }
        for name, (holds, wanted) in checks.items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r} is out of range: it must be {wanted}")

    def with_seed(self) -> int:
        """The request's seed, drawn from the operating system where none was given."""
        return secrets.randbits(63) if self.seed is None else self.seed

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


class BatchSampling:
    """The sampling parameters of B requests, and the histories that penalties need.

    `prompts` and `outputs` are the committed token ids per request; only those of requests with penalties are read.
    Raises ValueError for a biased token outside the vocabulary.
    """

    def __init__(
        self,
        params: Seq[SamplingParams],
        prompts: Seq[Seq[int]],
        outputs: Seq[Seq[int]],
        vocab_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.params, self.vocab_size, self.device = list(params), vocab_size, torch.device(device)
        for one in self.params:
            for token in one.logit_bias:
                if token >= vocab_size:
                    raise ValueError(f"logit_bias names token {token}; the vocabulary has {vocab_size} tokens")
        self.is_greedy = all(one.temperature == 0 for one in self.params)
        self._penalised = any(one.has_penalties for one in self.params)
        if self._penalised:
            self._output_count_BV = torch.stack(
                [self._count(one, out) for one, out in zip(params, outputs, strict=True)]
            )
            self._is_seen_BV = torch.stack(
                [self._count(one, seen) > 0 for one, seen in zip(params, prompts, strict=True)]
            )

    def probabilities(
        self, logits_RV: Tensor, rows_R: Tensor, paths_RK: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Laws [R, V] from logits, row r under the parameters of request `rows_R[r]`.

        `paths_RK` holds the drafted tokens between the committed ones and the row (-1 padding), which penalties count.
        """
        scores = logits_RV.to(dtype, copy=True)
        rows = rows_R.tolist()
        for r, b in enumerate(rows):
            if bias := self.params[b].logit_bias:
                ids = torch.tensor(list(bias), device=scores.device)
                scores[r, ids] += torch.tensor(list(bias.values()), dtype=dtype, device=scores.device)
        if self._penalised:
            scores = self._penalise(scores, rows_R, paths_RK)
        if self.is_greedy:
            return _one_hot(scores)
        return self._warp(scores, rows)

    def _warp(self, scores: Tensor, rows: list[int]) -> Tensor:
        params = [self.params[b] for b in rows]

        def column(name: str, off: float | None = None) -> Tensor | None:
            values = [getattr(one, name) for one in params]
            if all(value == off for value in values):
                return None
            return torch.tensor(values, dtype=scores.dtype, device=scores.device)[:, None]

        temperature = column("temperature")
        assert temperature is not None
        warped = scores / torch.where(temperature > 0, temperature, 1)
        top_k = column("top_k", 0)
        if top_k is not None:
            k = top_k.clamp(1, self.vocab_size).long()
            kth = warped.topk(int(k.max())).values.gather(1, k - 1)
            warped = warped.masked_fill((warped < kth) & (top_k > 0), -torch.inf)
        probs = warped.softmax(-1)
        top_p, min_p = column("top_p", 1.0), column("min_p", 0.0)
        if top_p is not None or min_p is not None:
            dropped = torch.zeros_like(probs, dtype=torch.bool)
            if top_p is not None:
                dropped |= probs < _top_p_cut(probs, top_p)
            if min_p is not None:
                dropped |= probs < min_p * probs.amax(-1, keepdim=True)
            # A second softmax instead of a division: a row that drops nothing keeps its very bits, whoever is beside it.
            probs = warped.masked_fill(dropped, -torch.inf).softmax(-1)
        is_greedy = temperature == 0
        return torch.where(is_greedy, _one_hot(scores), probs) if bool(is_greedy.any()) else probs

    def _penalise(self, scores: Tensor, rows_R: Tensor, paths_RK: Tensor | None) -> Tensor:
        output = self._output_count_BV[rows_R]
        if paths_RK is not None and paths_RK.numel():
            output = output.scatter_add(1, paths_RK.clamp_min(0), (paths_RK >= 0).to(output.dtype))
        seen = self._is_seen_BV[rows_R] | (output > 0)
        values = [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in self.params]
        repetition, presence, frequency = torch.tensor(values, dtype=scores.dtype, device=scores.device)[rows_R][
            ..., None
        ].unbind(1)
        repeated = torch.where(scores < 0, scores * repetition, scores / repetition)
        scores = torch.where(seen, repeated, scores)
        return scores - frequency * output - presence * (output > 0)

    def _count(self, params: SamplingParams, tokens: Seq[int]) -> Tensor:
        ids = torch.tensor(list(tokens) if params.has_penalties else [], dtype=torch.int64, device=self.device)
        return torch.bincount(ids, minlength=self.vocab_size)


class ModelLaws:
    """The target's laws at the nodes of a batch of trees, processed along each node's own path, computed when asked for.

    `logits_TV` holds the rows of all real nodes, trees behind one another in node order; `sampling` has a row per tree.
    """

    def __init__(
        self, logits_TV: Tensor, tree: TokenTree, sampling: BatchSampling, dtype: torch.dtype = torch.float32
    ) -> None:
        self.logits_TV, self.tree, self.sampling, self.dtype = logits_TV, tree, sampling, dtype
        self.first_B = tree.num_nodes_B.cumsum(0) - tree.num_nodes_B
        self._nodes_B: Tensor | None = None
        self._probs_BV: Tensor | None = None

    def at(self, nodes_B: Tensor) -> Tensor:
        """Laws [B, V] at one node of each tree."""
        # A rule that walks down asks again for rows that have stopped: only what moved is computed.
        if self._nodes_B is None or self._probs_BV is None:
            self._probs_BV = self._laws(torch.arange(self.tree.batch_size, device=nodes_B.device), nodes_B)
        else:
            moved = (nodes_B != self._nodes_B).nonzero().squeeze(1)
            if moved.numel() == self.tree.batch_size:
                self._probs_BV = self._laws(moved, nodes_B)
            elif moved.numel():
                self._probs_BV = self._probs_BV.index_copy(0, moved, self._laws(moved, nodes_B[moved]))
        self._nodes_B = nodes_B.clone()
        return self._probs_BV

    def all(self) -> Tensor:
        """Laws [B, N, V] of every node; rows of padding are zero."""
        rows, nodes = self.tree.is_node_BN.nonzero(as_tuple=True)
        out = torch.zeros(
            *self.tree.tokens_BN.shape, self.logits_TV.shape[1], dtype=self.dtype, device=self.logits_TV.device
        )
        out[rows, nodes] = self._laws(rows, nodes)
        return out

    def _laws(self, rows_R: Tensor, nodes_R: Tensor) -> Tensor:
        paths = drafted_paths(self.tree, rows_R, nodes_R) if self.tree.max_nodes > 1 else None
        return self.sampling.probabilities(self.logits_TV[self.first_B[rows_R] + nodes_R], rows_R, paths, self.dtype)


def drafted_paths(tree: TokenTree, rows_R: Tensor, nodes_R: Tensor) -> Tensor:
    """Tokens [R, N] of each node's drafted ancestors and itself, the root left out, -1 elsewhere."""
    on_path = tree.ancestors_BNN[rows_R, nodes_R]
    on_path[:, 0] = False
    return torch.where(on_path, tree.tokens_BN[rows_R], -1)


def log_confidence(logits: Tensor) -> Tensor:
    """Log-probabilities of the unprocessed law, over the last axis, in float32: what confidence trees rank nodes by."""
    return logits.float().log_softmax(-1)


def token_logprobs(logits_RV: Tensor, tokens: Seq[int], top: int) -> list[tuple[float, dict[int, float]]]:
    """Per row the unprocessed log-probability of its token and the `top` most likely alternatives, most likely first."""
    logprobs = log_confidence(logits_RV)
    best = logprobs.topk(min(top, logprobs.shape[1]))
    chosen = logprobs.gather(1, torch.tensor(list(tokens), device=logprobs.device)[:, None]).squeeze(1).tolist()
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [(value, dict(zip(ids, values, strict=True))) for value, (ids, values) in zip(chosen, pairs, strict=True)]


def _one_hot(scores: Tensor) -> Tensor:
    return torch.zeros_like(scores).scatter_(1, scores.argmax(-1, keepdim=True), 1.0)


def _top_p_cut(probs: Tensor, top_p: Tensor) -> Tensor:
    """The smallest probability that stays: tokens stay while the mass of the likelier ones is below top_p."""
    size = probs.shape[-1]
    # A full sort of the vocabulary costs milliseconds; the mass almost always lies in the first thousand tokens.
    for width in (1024, size):
        ordered = probs.topk(min(width, size)).values
        before = torch.nn.functional.pad(ordered.cumsum(-1)[:, :-1], (1, 0))
        if width >= size or bool(((before[:, -1:] >= top_p) | (top_p >= 1)).all()):
            break
    kept = (before < top_p).sum(-1, keepdim=True).clamp_min(1)
    cut = ordered.gather(1, kept - 1)
    return torch.where(top_p < 1, cut, 0)
