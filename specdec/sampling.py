"""From logits to probabilities: the only place where that happens, for target and draft models alike."""

from __future__ import annotations

import itertools
import math
import secrets
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from specdec.int_tensor import int_tensor, sent
from specdec.kernels import cpu
from specdec.kernels.dispatch import use_triton
from specdec.kernels.sampling import RowKeys, RowParams, laws, sample
from specdec.kernels.sampling.reference import laws_reference, one_hot
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
        self.is_penalised = any(one.has_penalties for one in self.params)
        self._bias_BV = self._bias() if any(one.logit_bias for one in self.params) else None
        # Copied now, before a forward is under way: the device takes copies and kernels in turn.
        self._row_params = None if self.device.type == "cpu" else self._columns()
        if self.is_penalised:
            values = [(one.repetition_penalty, one.presence_penalty, one.frequency_penalty) for one in self.params]
            self._penalties_B3 = sent(torch.tensor(values, dtype=torch.float64), self.device)
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
        scores = self._processed(logits_RV.to(dtype), rows_R, paths_RK)
        if dtype == torch.float32 and use_triton(scores):
            return laws(scores, self.row_params.select(rows_R))
        if self.is_greedy:
            return one_hot(scores)
        return self._warp(scores, rows_R.tolist())

    def tokens(self, logits_RV: Tensor, rows_R: Tensor, paths_RK: Tensor | None, keys: RowKeys) -> Tensor:
        """A token [R] from each row's law, as for `probabilities`, drawn in one with it."""
        return sample(self._processed(logits_RV, rows_R, paths_RK), self.row_params.select(rows_R), keys)

    @property
    def is_argmax(self) -> bool:
        """Whether every request takes the largest of its logits as they come."""
        return self.is_greedy and not self.is_penalised and self._bias_BV is None

    @property
    def row_params(self) -> RowParams:
        """The parameters as tensors [B]."""
        if self._row_params is None:
            self._row_params = self._columns()
        return self._row_params

    def _columns(self) -> RowParams:
        floats_3B = torch.tensor(
            [[getattr(one, name) for one in self.params] for name in ("temperature", "top_p", "min_p")]
        )
        temperature_B, top_p_B, min_p_B = sent(floats_3B.float(), self.device)
        return RowParams(temperature_B, int_tensor([one.top_k for one in self.params], self.device), top_p_B, min_p_B)

    def _bias(self) -> Tensor:
        rows = [b for b, one in enumerate(self.params) for _ in one.logit_bias]
        ids = [token for one in self.params for token in one.logit_bias]
        values = [bias for one in self.params for bias in one.logit_bias.values()]
        bias_BV = torch.zeros(len(self.params), self.vocab_size, dtype=torch.float64)
        bias_BV[rows, ids] = torch.tensor(values, dtype=torch.float64)
        return sent(bias_BV, self.device)

    def _processed(self, scores: Tensor, rows_R: Tensor, paths_RK: Tensor | None) -> Tensor:
        """Logits under bias and penalties; the given ones where nobody asks for either."""
        if self._bias_BV is None and not self.is_penalised:
            return scores
        # Never in half precision.
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self._bias_BV is not None:
            scores = scores + self._bias_BV[rows_R].to(scores.dtype)
        return self._penalise(scores, rows_R, paths_RK) if self.is_penalised else scores

    def _warp(self, scores: Tensor, rows: list[int]) -> Tensor:
        params = [self.params[b] for b in rows]

        def column(name: str, off: float | None = None) -> Tensor | None:
            values = [getattr(one, name) for one in params]
            if all(value == off for value in values):
                return None
            return torch.tensor(values, dtype=scores.dtype, device=scores.device)[:, None]

        temperature = column("temperature")
        assert temperature is not None
        return laws_reference(scores, temperature, column("top_k", 0), column("top_p", 1.0), column("min_p", 0.0))

    def _penalise(self, scores: Tensor, rows_R: Tensor, paths_RK: Tensor | None) -> Tensor:
        output = self._output_count_BV[rows_R]
        if paths_RK is not None and paths_RK.numel():
            output = output.scatter_add(1, paths_RK.clamp_min(0), (paths_RK >= 0).to(output.dtype))
        seen = self._is_seen_BV[rows_R] | (output > 0)
        repetition, presence, frequency = self._penalties_B3.to(scores.dtype)[rows_R][..., None].unbind(1)
        repeated = torch.where(scores < 0, scores * repetition, scores / repetition)
        scores = torch.where(seen, repeated, scores)
        return scores - frequency * output - presence * (output > 0)

    def _count(self, params: SamplingParams, tokens: Seq[int]) -> Tensor:
        ids = int_tensor(list(tokens) if params.has_penalties else [], self.device)
        # Not by bincount, which tells the host the largest.
        return torch.zeros(self.vocab_size, dtype=torch.int64, device=self.device).scatter_add_(
            0, ids, torch.ones_like(ids)
        )


class ModelLaws:
    """The target's laws at the nodes of a batch of trees, processed along each node's own path, computed when asked for.

    `logits_TV` holds the rows of all real nodes, trees behind one another in node order; `sampling` has a row per tree.
    """

    def __init__(
        self, logits_TV: Tensor, tree: TokenTree, sampling: BatchSampling, dtype: torch.dtype = torch.float32
    ) -> None:
        self.logits_TV, self.tree, self.sampling, self.dtype = logits_TV, tree, sampling, dtype
        self._first: list[int] | None = None
        self._nodes_B: Tensor | None = None
        self._probs_BV: Tensor | None = None
        self._packed_TV: Tensor | None = None

    @cached_property
    def first_B(self) -> Tensor:
        """The row of each tree's root."""
        return self.tree.num_nodes_B.cumsum(0) - self.tree.num_nodes_B

    def at(self, nodes_B: Tensor) -> Tensor:
        """Laws [B, V] at one node of each tree."""
        if self.on_device:
            # Which rows have moved is not known on the host: it would have to wait.
            return self.packed()[self.first_B + nodes_B]
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
        rows, nodes = self._places()
        out = torch.zeros(
            *self.tree.tokens_BN.shape, self.logits_TV.shape[1], dtype=self.dtype, device=self.logits_TV.device
        )
        out[rows, nodes] = self.packed() if self.on_device else self._laws(rows, nodes)
        return out

    def packed(self) -> Tensor:
        """Laws [T, V] of every real node, behind one another as their logits are; computed once."""
        if self._packed_TV is None:
            self._packed_TV = self._laws(*self._places())
        return self._packed_TV

    def largest(self, nodes: Seq[int], rows: Seq[int]) -> list[int]:
        """The token with the largest logit at one node of each of some trees, the first of equal ones."""
        if self._first is None:
            self._first = [0, *itertools.accumulate(self.tree.shape.sizes)]
        places = [self._first[row] + node for row, node in zip(rows, nodes, strict=True)]
        # One node of each tree and no other: they have no more.
        is_all = len(places) == len(self.logits_TV)
        places_R = None if is_all else int_tensor(places, self.logits_TV.device)
        if cpu.can_find_largest(self.logits_TV):
            return [int(token) for token in cpu.largest(self.logits_TV, places_R).tolist()]
        logits_RV = self.logits_TV if places_R is None else self.logits_TV.index_select(0, places_R)
        # max finds the same index as argmax, on the CPU in a third of the time.
        return [int(token) for token in logits_RV.to(self.dtype).max(-1).indices.tolist()]

    def drawn(self, keys: Callable[[Tensor, Tensor], RowKeys]) -> Tensor:
        """A token [T] from the law of every real node; `keys` tells of rows [T] and depths [T] what each draw is keyed by."""
        rows_T, nodes_T = self._places()
        depths_T = self.tree.depth_BN[rows_T, nodes_T]
        return self.sampling.tokens(self.logits_TV, rows_T, self._paths(rows_T, nodes_T), keys(rows_T, depths_T))

    @property
    def on_device(self) -> bool:
        """Whether the kernels make these laws, and tokens of them."""
        return self.dtype == torch.float32 and use_triton(self.logits_TV)

    def _places(self) -> tuple[Tensor, Tensor]:
        """Tree and node [T] of every row of the logits."""
        # Their number is known, so nothing has to be counted on the device.
        count, trees = len(self.logits_TV), torch.arange(self.tree.batch_size, device=self.tree.device)
        rows_T = trees.repeat_interleave(self.tree.num_nodes_B, output_size=count)
        return rows_T, torch.arange(count, device=self.tree.device) - self.first_B[rows_T]

    def _paths(self, rows_R: Tensor, nodes_R: Tensor) -> Tensor | None:
        wanted = self.sampling.is_penalised and self.tree.max_nodes > 1
        return drafted_paths(self.tree, rows_R, nodes_R) if wanted else None

    def _laws(self, rows_R: Tensor, nodes_R: Tensor) -> Tensor:
        paths = self._paths(rows_R, nodes_R)
        logits_RV = self.logits_TV.index_select(0, self.first_B[rows_R] + nodes_R)
        return self.sampling.probabilities(logits_RV, rows_R, paths, self.dtype)


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
