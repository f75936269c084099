"""Heads that tests share: forwards written out densely, and tiny heads that have learnt a target's own texts by heart."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention, silu, smooth_l1_loss
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from specdec import PagedModel
from specdec.drafters.heads import EagleConfig, EagleHead, MedusaConfig, MedusaHeads
from specdec.drafters.heads.formats import save_head


def dense_eagle(head: EagleHead, embeddings: Tensor, features: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """The layer as the papers draw it, one sequence, from the parameters by their published names."""
    config, weights = head.config, head.state_dict()
    prefix = "midlayer" if config.version == 3 else "layers.0"

    def norm(x: Tensor, name: str) -> Tensor:
        scale = (x.double().pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
        return (x.double() * scale).to(x.dtype) * weights[f"{name}.weight"]

    def project(x: Tensor, name: str) -> Tensor:
        return linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    if config.version == 3:
        fused = norm(features, f"{prefix}.hidden_norm")
        read = torch.cat([norm(embeddings, f"{prefix}.input_layernorm"), fused], -1)
        residual = fused if config.norm_before_residual else features
    else:
        read = residual = project(torch.cat([embeddings, features], -1), "fc")
    query, key, value = (
        project(read, f"{prefix}.self_attn.{name}_proj").unflatten(1, (-1, config.head_size)).transpose(0, 1)[None]
        for name in "qkv"
    )
    settings = LlamaConfig(
        hidden_size=8, num_attention_heads=1, head_dim=config.head_size, rope_parameters=dict(config.rope)
    )
    cos, sin = LlamaRotaryEmbedding(settings)(query, positions[None])
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    attended = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    hidden = residual + project(attended[0].transpose(0, 1).flatten(1), f"{prefix}.self_attn.o_proj")
    read = norm(hidden, f"{prefix}.post_attention_layernorm")
    gate, up = (project(read, f"{prefix}.mlp.{name}_proj") for name in ("gate", "up"))
    return hidden + project(silu(gate) * up, f"{prefix}.mlp.down_proj")


def attend_within(mask: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention over the packed tokens themselves."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads_first = (states.transpose(0, 1)[None] for states in (query, key, value))
        return scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return attend


def eagle_config(target: PagedModel, version: int, **changes: object) -> EagleConfig:
    settings = {
        "version": version,
        "hidden_size": target.hidden_size,
        "target_hidden_size": target.hidden_size,
        "intermediate_size": 48,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 8,
        "rms_norm_eps": 1e-6,
        "vocab_size": target.vocab_size,
        "draft_vocab_size": target.vocab_size,
        "feature_layers": (target.num_layers,) if version == 1 else (0, 1, target.num_layers),
        "max_positions": 256,
    }
    return EagleConfig(**(settings | changes))  # type: ignore[arg-type]


def hidden_states(target: PagedModel, tokens: Seq[int]) -> tuple[Tensor, ...]:
    """The target's states of every layer [n, D], from transformers' own attention."""
    target.model.set_attn_implementation("eager")
    with torch.no_grad():
        out = target.model(torch.tensor([list(tokens)]), output_hidden_states=True)
    target.model.set_attn_implementation("specdec_paged")
    return tuple(states[0] for states in out.hidden_states)


@torch.enable_grad()
def learn_medusa(target: PagedModel, texts: Seq[Seq[int]], num_heads: int = 3, steps: int = 60) -> MedusaHeads:
    """Heads that have seen `texts` often."""
    torch.manual_seed(0)
    heads = MedusaHeads.initial(
        MedusaConfig(target.hidden_size, target.vocab_size, num_heads), target.model.lm_head.weight
    )
    states = [hidden_states(target, text)[-1] for text in texts]
    optimiser = torch.optim.Adam(heads.parameters(), 0.02)
    for _ in range(steps):
        loss = torch.zeros(())
        for i in range(num_heads):
            read = torch.cat([hidden[: -i - 2] for hidden in states])
            wanted = torch.cat([torch.tensor(text[i + 2 :]) for text in texts])
            loss = loss + cross_entropy(heads[i](read), wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return heads.eval()


@torch.enable_grad()
def learn_eagle(target: PagedModel, config: EagleConfig, texts: Seq[Seq[int]], steps: int = 80) -> EagleHead:
    """A head that has seen `texts` often: two steps deep, the second on its own outputs."""
    torch.manual_seed(0)
    head = EagleHead(config)
    if head.draft_to_target_R is not None:
        common = torch.bincount(torch.tensor([token for text in texts for token in text]), minlength=config.vocab_size)
        head.draft_to_target_R.copy_(common.topk(config.draft_vocab_size).indices.sort().values)
    ids = torch.arange(config.vocab_size) if head.draft_to_target_R is None else head.draft_to_target_R
    place = torch.full((config.vocab_size,), -100).scatter(0, ids, torch.arange(len(ids)))
    packed = [(hidden_states(target, text), torch.tensor(text)) for text in texts]
    owner = torch.cat([torch.full((len(text) - 2,), i) for i, text in enumerate(texts)])
    mask = (owner[:, None] == owner) & torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    positions = torch.cat([torch.arange(len(text) - 2) for text in texts])
    features = [torch.cat([states[layer][:-2] for states, _ in packed]) for layer in config.feature_layers]
    following = torch.cat([states[-1][1:-1] for states, _ in packed])
    tokens, wanted = (torch.cat([text[i : len(text) - 2 + i] for _, text in packed]) for i in (1, 2))
    optimiser = torch.optim.Adam(head.parameters(), 0.01)
    for _ in range(steps):
        loss, hidden = torch.zeros(()), head.fuse(features)
        for _ in range(2):
            hidden = head(target.embed(tokens), hidden, positions, attend_within(mask))
            loss = loss + cross_entropy(head.logits(hidden, target.lm_head), place[wanted])
            if config.version == 1:
                loss = loss + smooth_l1_loss(hidden, following)
            # Its own output at t serves as the feature of t + 1.
            hidden = torch.cat([hidden[:1], hidden[:-1]])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return head.eval()


def save_target_and_head(tiny, tokenizer) -> None:
    """A target and an EAGLE head for it, in the folders `target` and `head` of the working directory."""
    tiny(vocab_size=len(tokenizer)).save_pretrained("target")
    tokenizer.save_pretrained("target")
    save_head(EagleHead(eagle_config(PagedModel.load("target"), 3, draft_vocab_size=40)), "head")
