"""PagedModel: any Hugging Face causal LM running over pages, target and draft model alike."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from specdec.attention import ATTENTION_NAME, TreeContext, UnsupportedModelError, register
from specdec.decoder import FastDecoder, NotServed
from specdec.interfaces import ForwardResult
from specdec.kernels.cpu import can_run
from specdec.kernels.tree_attention import AttentionPlan, SequencePlan
from specdec.kv_cache import KVCache
from specdec.packing import can_pack, pack_linears, set_invariant
from specdec.pages import PagePool, PageTable, TableView
from specdec.static_shapes import StaticInputs


@dataclass(frozen=True)
class Segment:
    """One sequence's new tokens in a packed forward.

    Every new token sees positions 0..`visible_len`-1; behind them lies a tail of M slots, the new tokens the last Q of
    it. `tail_mask_QM` says which of the tail a new token sees (None: M equals Q and a token sees the ones up to itself),
    `positions_Q` the new tokens' positions and `tail_positions_M` those of the whole tail (None: M equals Q).
    """

    table: PageTable | TableView
    visible_len: int
    token_ids_Q: Tensor
    positions_Q: Tensor
    tail_mask_QM: Tensor | None = None
    tail_positions_M: Tensor | None = None

    @property
    def tail_len(self) -> int:
        return (self.positions_Q if self.tail_positions_M is None else self.tail_positions_M).shape[0]


class PagedModel:
    """A causal LM whose attention reads a paged KV cache: packed tokens of many sequences, prompt chunks and trees mixed.

    `model` is any transformers decoder-only causal LM; it is switched to the paged attention function and to inference.
    Raises UnsupportedModelError where that attention is not used by every layer. Use `specdec.loading.load_model` to load
    by hub id, folder or GGUF file and to run the self-check.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, name: str = ""
    ) -> None:
        register()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name or str(getattr(model.config, "name_or_path", "")) or type(model).__name__
        config = model.config.get_text_config(decoder=True)
        self.num_layers: int = config.num_hidden_layers
        self.hidden_size: int = config.hidden_size
        self.max_positions = _position_limit(config)
        self.numerics = "fast"
        self._some_weight = next(model.parameters())
        self._decoder: FastDecoder | None = None
        self.is_rounded = False
        self._takes_rows = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        try:
            model.set_attn_implementation(ATTENTION_NAME)
        except Exception as error:
            raise UnsupportedModelError(
                f"{self.name}: {type(model).__name__} cannot change its attention: {error}"
            ) from error
        context, self.vocab_size = self._measure()
        self.layer_shapes = [context.shapes[layer] for layer in range(self.num_layers)]
        self.layer_options = [context.options[layer] for layer in range(self.num_layers)]

    @staticmethod
    def load(path: str, **options: Any) -> PagedModel:
        """Loads by hub id, local folder or GGUF file; see `specdec.loading.load_model` for the options."""
        from specdec.loading import load_model

        return load_model(path, **options)

    def pack(self, int8: bool = False) -> None:
        """Puts the linear layers in a packed layout where that pays (bfloat16 on the CPU); else does nothing.

        The plain weights are gone afterwards: the model can run, not be saved or moved. Models built as Llama is then run all
        their layers in one call, where the CPU has kernels for it. `int8` rounds the weights to 8 bits there: a draft model may
        be rounded, a target not. Raises UnsupportedModelError where the model reads a weight that is no longer there.
        """
        if can_pack(self.device, self.dtype):
            pack_linears(self.model, self._measure, int8)
            # oneDNN's layout is of bfloat16 alone.
            self.is_rounded = int8 and can_run()
            self._measure()
            with suppress(NotServed):
                self._decoder = FastDecoder(self.model, self.layer_options)

    @property
    def is_fused(self) -> bool:
        """Whether all layers run in one call, see `FastDecoder`."""
        return self._decoder is not None

    def drop_decoder(self) -> None:
        """From now on the model runs layer by layer, as transformers does."""
        self._decoder = None

    @contextmanager
    def layer_by_layer(self) -> Iterator[None]:
        """While it lasts, the forward is that of transformers: what the quick way is compared with."""
        decoder, self._decoder = self._decoder, None
        try:
            yield
        finally:
            self._decoder = decoder

    def set_numerics(self, numerics: str) -> None:
        """fast, or invariant: a token's logits depend on its own path alone, to the last bit, not on the tree, chunk, batch or
        pages around it. `specdec.invariance.make_invariant` also checks it."""
        set_invariant(self.model, numerics == "invariant")
        self.numerics = numerics

    @property
    def device(self) -> torch.device:
        # Not the model's own answer: it goes through all modules to find a parameter, which every step would pay for.
        return self._some_weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every id that ends a sequence, as the generation config or else the tokenizer says."""
        generation = getattr(self.model, "generation_config", None)
        ids = getattr(generation, "eos_token_id", None)
        if ids is None and self.tokenizer is not None:
            ids = self.tokenizer.eos_token_id
        return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)

    def new_cache(self, pool: PagePool) -> KVCache:
        """Tensors for this model's layers on the pool's pages."""
        return KVCache(pool, self.layer_shapes, self.dtype, self.device)

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """Embeddings [T, D] of tokens."""
        return self.model.get_input_embeddings()(token_ids_T)

    def lm_head(self, hidden_TD: Tensor) -> Tensor:
        """Logits [T, V] of states behind the final norm."""
        return self.model.get_output_embeddings()(hidden_TD)

    @torch.inference_mode()
    def forward(
        self,
        segments: Seq[Segment],
        cache: KVCache,
        wanted_rows: Tensor | None = None,
        hidden_layers: Seq[int] = (),
    ) -> ForwardResult:
        """One forward over the packed tokens of all segments; their keys and values are in the cache afterwards.

        `wanted_rows` picks the packed rows whose logits are returned (None: all); `hidden_layers` the hidden states
        returned for every packed token. The pages must have been reserved.
        """
        plan = plan_attention(segments, self.device)
        if cache.graphs is not None:
            replayed = self._replay(segments, plan, cache, wanted_rows, hidden_layers)
            if replayed is not None:
                return replayed
        tokens = torch.cat([segment.token_ids_Q for segment in segments])
        positions = torch.cat([segment.positions_Q for segment in segments])
        context = TreeContext(plan, cache, self.numerics == "invariant")
        rows = torch.arange(len(tokens), device=self.device) if wanted_rows is None else wanted_rows
        if self._decoder is not None:
            return self._decoder.forward(tokens, positions, context.plan, cache, rows, hidden_layers)
        return self._run(tokens, positions, context, rows, tuple(hidden_layers))

    def _replay(
        self,
        segments: Seq[Segment],
        plan: AttentionPlan,
        cache: KVCache,
        wanted_rows: Tensor | None,
        hidden_layers: Seq[int],
    ) -> ForwardResult | None:
        """The same forward as a recorded graph of fixed shape, all rows' logits included; None where it is not to be had."""
        layers = tuple(hidden_layers)
        is_invariant = self.numerics == "invariant"

        def body(inputs: StaticInputs) -> tuple[Tensor, ...]:
            context = TreeContext(inputs.plan, cache, is_invariant)
            result = self._run(inputs.tokens_T, inputs.positions_T, context, inputs.rows_T, layers)
            return (result.logits_RV, *(result.hidden[layer] for layer in layers))

        assert cache.graphs is not None
        outputs = cache.graphs.run((self.name, layers, is_invariant), segments, plan, cache.scratch_slot, body)
        if outputs is None:
            return None
        logits_TV, *hidden = outputs
        logits_RV = logits_TV if wanted_rows is None else logits_TV[wanted_rows]
        return ForwardResult(logits_RV, dict(zip(layers, hidden, strict=True)))

    def _run(
        self, tokens: Tensor, positions: Tensor, context: TreeContext, rows: Tensor, hidden_layers: tuple[int, ...] = ()
    ) -> ForwardResult:
        options: dict[str, Any] = {"logits_to_keep": rows} if self._takes_rows else {}
        if hidden_layers:
            options["output_hidden_states"] = True
        out = self.model(
            input_ids=tokens[None].to(self.device),
            position_ids=positions[None].to(self.device),
            use_cache=False,
            tree_context=context,
            **options,
        )
        logits = out.logits[0] if self._takes_rows else out.logits[0][rows]
        return ForwardResult(logits, {layer: out.hidden_states[layer][0] for layer in hidden_layers})

    @torch.inference_mode()
    def _measure(self) -> tuple[TreeContext, int]:
        """What every layer asks of its attention and the width of the logits, from a forward of one token that attends to
        nothing."""
        token, row = torch.tensor([0]), torch.tensor([0])
        context = TreeContext(AttentionPlan(row, 0, []), None)
        try:
            result = self._run(token, row, context, row.to(self.device))
        except UnsupportedModelError:
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"{self.name}: {type(self.model).__name__} cannot run over pages ({type(error).__name__}: {error})"
            ) from error
        missing = sorted(set(range(self.num_layers)) - set(context.shapes))
        if missing:
            raise UnsupportedModelError(
                f"{self.name}: layers {missing} of {type(self.model).__name__} do not use the attention function registered "
                f"with transformers, so they cannot be served from pages; choose a model that does"
            )
        return context, result.logits_RV.shape[-1]


def _position_limit(config: PreTrainedConfig) -> int | None:
    """Positions that the model can take; None where it does not say.

    Long RoPE turns every token of a forward to other frequencies as soon as one lies past the original length: keys in
    the cache would no longer fit, and one long sequence would change its batch mates. So it ends there.
    """
    limits = [getattr(config, "max_position_embeddings", None)]
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *(value for value in ropes.values() if isinstance(value, dict))):
        if rope.get("rope_type") == "longrope":
            limits.append(rope.get("original_max_position_embeddings"))
    return min((limit for limit in limits if limit is not None), default=None)


def plan_attention(segments: Seq[Segment], device: torch.device) -> AttentionPlan:
    """Slots to write and to read for the packed tokens of `segments`."""
    plans, slots, row = [], [], 0
    for segment in segments:
        # Not len(): that goes by way of Python, and a step asks for dozens.
        queries = segment.token_ids_Q.shape[0]
        tail_positions = segment.positions_Q if segment.tail_positions_M is None else segment.tail_positions_M
        keys = segment.visible_len + tail_positions.shape[0]
        assert keys <= segment.table.capacity, f"{keys} keys do not fit {segment.table.capacity} reserved slots"
        first, own = segment.table.first_slot, segment.table.slots(device)[:keys]
        plans.append(
            SequencePlan(
                row,
                queries,
                segment.visible_len,
                None if segment.tail_mask_QM is None else segment.tail_mask_QM.to(device),
                tail_positions.to(device),
                first,
                own if first is None else None,
            )
        )
        slots.append(own[keys - queries :])
        row += queries
    lone = plans[0].first_slot if len(plans) == 1 else None
    first_slot = None if lone is None else lone + plans[0].num_keys - plans[0].num_queries
    return AttentionPlan(torch.cat(slots), first_slot, plans)
