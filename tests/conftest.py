"""Models that the tests share: tiny ones made here, and the embedded real one."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# Before anything imports triton, which then asks whether kernels are to run in Python.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import interpreter  # noqa: F401
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from specdec.engine import Engine
from specdec.model import PagedModel

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Measured beside other tests, costs must not become what the user's own runs take for granted.
os.environ.setdefault("SPECDEC_CACHE", str(Path(__file__).parents[1] / ".pytest_cache" / "specdec"))

# Tiny tensors only lose by threads, and lose badly where other processes want the cores.
torch.set_num_threads(1)

VOCAB_SIZE = 97


def make_tiny(seed: int = 0, noise: float = 0.0, architecture: str = "llama", **overrides: object):
    """A random float32 model of two layers; `noise` perturbs it, so that a draft model agrees with its target often."""
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | overrides
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            fresh = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(fresh * 0.25 if parameter.ndim > 1 else 1 + 0.1 * fresh)
        other = torch.Generator().manual_seed(seed + 1)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=other), alpha=noise)
    return model


def make_tokenizer(with_chat: bool = True) -> PreTrainedTokenizerFast:
    """One token per character, byte-level: every text has a spelling, and every token a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {char: i + 3 for i, char in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    if with_chat:
        tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    return tokenizer


@pytest.fixture(scope="session")
def tiny() -> Callable[..., object]:
    return make_tiny


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


class StopsAfter(Engine):
    """Breaks off, as a killed process does, when asked for one batch more than `batches`."""

    batches = 1 << 30

    def generate(self, prompts, params=None, *, chat=False):  # type: ignore[no-untyped-def]
        self.batches -= 1
        if self.batches < 0:
            raise KeyboardInterrupt
        return super().generate(prompts, params, chat=chat)


@functools.cache
def serves_invariant() -> bool:
    """Whether numerics=invariant must work here: where oneDNN has AMX for bfloat16; elsewhere, where the load check says so."""
    from specdec.attention import UnsupportedModelError
    from specdec.invariance import make_invariant
    from specdec.packing import can_pack

    if not can_pack(torch.device("cpu"), torch.bfloat16):
        return False
    if torch.cpu._is_amx_tile_supported() and "ONEDNN_MAX_CPU_ISA" not in os.environ:
        return True
    model = PagedModel(make_tiny(max_position_embeddings=1024).bfloat16())
    model.pack()
    try:
        make_invariant(model)
    except UnsupportedModelError:
        return False
    return True
