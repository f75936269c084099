"""Cross-entropy behind a linear layer without keeping logits: gradients are made chunk by chunk on the way forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

# Token ids [M], or what gives the target's logits [m, R] of a slice of the rows.
Targets = Tensor | Callable[[slice], Tensor]
# Logits that exist at one time: 2 ** 25 numbers, 128 MiB in float32.
_CHUNK = 1 << 25


@dataclass(frozen=True)
class CrossEntropy:
    """`loss` is the weighted sum over rows; `correct_M` says where the largest logit is the target's (likeliest) token."""

    loss: Tensor
    correct_M: Tensor


def linear_cross_entropy(
    hidden_MD: Tensor,
    weight_RD: Tensor,
    targets: Targets,
    weights_M: Tensor,
    bias_R: Tensor | None = None,
    chunk_numbers: int = _CHUNK,
) -> CrossEntropy:
    """The sum of `weights_M` times the cross-entropy of softmax(hidden W^T + bias) against `targets`: token ids [M], or
    logits whose softmax is the target law (a soft cross-entropy: its minimum is that law's entropy).

    Products run in autocast's type where autocast is on; softmax, loss and the weight's gradient in float32 at least. The
    logits of a few rows exist at a time, those of all rows never do: the gradient is computed beside the loss, as it is
    linear in what comes from above. `bias_R` gets no gradient.
    """
    device = hidden_MD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_MD.dtype
    needs_gradient = torch.is_grad_enabled() and (hidden_MD.requires_grad or weight_RD.requires_grad)
    with torch.autocast(device, enabled=False):
        loss, correct_M = _LinearCrossEntropy.apply(
            hidden_MD, weight_RD, targets, weights_M, bias_R, dtype, needs_gradient, chunk_numbers
        )
    return CrossEntropy(loss, correct_M)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_RD: Tensor,
        targets: Targets,
        weights_M: Tensor,
        bias_R: Tensor | None,
        dtype: torch.dtype,
        needs_gradient: bool,
        chunk_numbers: int,
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(dtype, torch.float32)
        weight, hidden = weight_RD.to(dtype), hidden_MD.to(dtype)
        rows = max(chunk_numbers // max(len(weight), 1), 1)
        loss = torch.zeros((), dtype=exact, device=hidden.device)
        correct_M = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        by_hidden = torch.empty_like(hidden) if needs_gradient and hidden_MD.requires_grad else None
        by_weight = torch.zeros_like(weight_RD, dtype=exact) if needs_gradient and weight_RD.requires_grad else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            scale_m1 = weights_M[part, None]
            logits = linear(hidden[part], weight, None if bias_R is None else bias_R.to(dtype))
            highest_m1 = logits.amax(-1, keepdim=True)
            gradient = logits.softmax(-1, dtype=exact)
            # The largest probability tells the normaliser without another pass: log p_max = l_max - log sum exp l.
            logsumexp_m = highest_m1[:, 0].to(exact) - gradient.amax(-1).log()
            if isinstance(targets, Tensor):
                ids_m1 = targets[part, None]
                wanted_m1 = logits.gather(1, ids_m1)
                expected_m = wanted_m1[:, 0].to(exact)
                correct_M[part] = (wanted_m1 >= highest_m1)[:, 0]
                gradient.scatter_add_(1, ids_m1, gradient.new_full(ids_m1.shape, -1.0))
            else:
                wanted = targets(part)
                law = wanted.softmax(-1, dtype=exact)
                expected_m = torch.bmm(law[:, None], logits.to(exact)[..., None])[:, 0, 0]
                # argmax is many times slower than this on a CPU.
                correct_M[part] = ((wanted >= wanted.amax(-1, keepdim=True)) & (logits >= highest_m1)).any(-1)
                gradient.sub_(law)
            loss += ((logsumexp_m - expected_m) * scale_m1[:, 0].to(exact)).sum()
            gradient = gradient.to(dtype)
            # Weights on the narrow side: rows of D numbers, not of R.
            if by_hidden is not None:
                by_hidden[part] = (gradient @ weight) * scale_m1.to(dtype)
            if by_weight is not None:
                by_weight += gradient.T @ (hidden[part] * scale_m1.to(dtype))
        ctx.save_for_backward(by_hidden, by_weight)
        ctx.dtypes = hidden_MD.dtype, weight_RD.dtype
        ctx.mark_non_differentiable(correct_M)
        return loss, correct_M

    @staticmethod
    def backward(ctx: Any, *above: Any) -> tuple[Tensor | None, ...]:
        by_hidden, by_weight = ctx.saved_tensors
        for_hidden, for_weight = ctx.dtypes
        scale = above[0]
        return (
            None if by_hidden is None else (by_hidden.to(for_hidden) * scale.to(for_hidden)),
            None if by_weight is None else (by_weight.to(for_weight) * scale.to(for_weight)),
            *[None] * 6,
        )
