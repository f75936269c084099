"""CUDA graphs: forwards of fixed shape are recorded once and replayed as a whole, without a launch per kernel."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specdec.kernels.tree_attention import AttentionPlan
from specdec.static_shapes import Ladder, Rung, StaticInputs

if TYPE_CHECKING:
    from specdec.model import Segment

# From the buffers to what is computed of them, T rows each.
Body = Callable[[StaticInputs], tuple[Tensor, ...]]
_WARM_UPS = 2


class ForwardGraphs:
    """Recorded forwards over one KV cache, a graph per shape and kind of forward, recorded when it is first wanted.

    Graphs hold the addresses of the cache's tensors: they go when these are replaced (`clear`). With `captures` false the same
    padded forward runs eagerly, on any device: that is how shapes and padding are tested. `plan` and all tensors of one `run`
    are read before it returns; what it returns is a copy.
    """

    def __init__(self, device: torch.device, ladder: Ladder | None = None, captures: bool = True) -> None:
        if captures:
            _require_cuda(device)
        self.device, self.ladder, self._captures = device, ladder or Ladder(), captures
        self._forwards: dict[tuple[Hashable, Rung], _Forward] = {}
        self._refused: set[Hashable] = set()
        self._memory: Any = None

    def __len__(self) -> int:
        return len(self._forwards)

    def clear(self) -> None:
        self._forwards.clear()
        self._memory = None

    def run(
        self,
        kind: Hashable,
        segments: Seq[Segment],
        plan: AttentionPlan,
        scratch_slot: int,
        body: Body,
        extra: Seq[Tensor] = (),
    ) -> tuple[Tensor, ...] | None:
        """What `body` gives for the packed rows of `segments`; None where no shape of the ladder holds them, or this kind of
        forward cannot be recorded: it then runs as it is. `kind` names all that `body` hangs on beside the buffers.
        """
        rung = None if kind in self._refused else self.ladder.rung(segments)
        if rung is None:
            return None
        tokens_T = torch.cat([one.token_ids_Q for one in segments])
        positions_T = torch.cat([one.positions_Q for one in segments])
        key = kind, rung
        forward = self._forwards.get(key)
        is_new = forward is None
        if forward is None:
            buffers = tuple(one.new_zeros(rung.rows, *one.shape[1:]) for one in extra)
            forward = _Forward(StaticInputs(rung, self.device, buffers), body)
        forward.inputs.fill(tokens_T, positions_T, plan, scratch_slot, extra)
        if is_new:
            if self._captures and not self._capture(forward, kind):
                return None
            self._forwards[key] = forward
        return tuple(output[: len(tokens_T)].clone() for output in forward.run())

    def _capture(self, forward: _Forward, kind: Hashable) -> bool:
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        try:
            forward.capture(self._memory)
        except RuntimeError as error:
            # A model that asks the device something in its forward, as experts may, cannot be recorded.
            warnings.warn(f"CUDA graphs are off for {kind}: it cannot be recorded ({error})", stacklevel=3)
            self._refused.add(kind)
            return False
        return True


class _Forward:
    """One shape: its buffers, and the graph once it is recorded."""

    def __init__(self, inputs: StaticInputs, body: Body) -> None:
        self.inputs, self._body = inputs, body
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: tuple[Tensor, ...] = ()

    def capture(self, memory: Any) -> None:
        """Records the forward over what lies in the buffers, which is computed on the way: kernels are compiled and libraries
        set up in runs before. Raises RuntimeError where it cannot be recorded."""
        side = torch.cuda.Stream(self.inputs.device)
        side.wait_stream(torch.cuda.current_stream(self.inputs.device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._body(self.inputs)
        torch.cuda.current_stream(self.inputs.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads, as a server has, may talk to the device meanwhile.
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            self._outputs = self._body(self.inputs)
        self._graph = graph

    def run(self) -> tuple[Tensor, ...]:
        if self._graph is None:
            return self._body(self.inputs)
        self._graph.replay()
        return self._outputs


def _require_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(f"CUDA graphs are for CUDA, not for {device.type}: use captures=False there")
