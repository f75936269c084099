"""Packed weights: the same numbers as the plain layout, one product for layers that read one input."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import pytest
import torch
from conftest import make_tiny
from test_model import ARCHITECTURES
from torch import nn

from specdec.engine import Engine
from specdec.loading import load_model
from specdec.model import PagedModel
from specdec.packing import PackedLinear, can_pack, pack_linears
from specdec.sampling import SamplingParams
from specdec.verifiers import Verifier

CPU = torch.device("cpu")
needs_bf16 = pytest.mark.skipif(not can_pack(CPU, torch.bfloat16), reason="weights are not packed on this CPU")


def linears(model: PagedModel, kind: type[nn.Module]) -> dict[str, nn.Module]:
    return {name: module for name, module in model.model.named_modules() if type(module) is kind}


def logits(model: PagedModel, rows: int = 5) -> torch.Tensor:
    """Logits of a prompt, by the model's own attention."""
    model.model.set_attn_implementation("eager")
    with torch.inference_mode():
        found = model.model(input_ids=torch.arange(3, 3 + rows)[None], use_cache=False).logits[0].float()
    model.model.set_attn_implementation("specdec_paged")
    return found


@needs_bf16
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_packed_model_computes_what_the_plain_one_does(architecture):
    torch.manual_seed(0)
    plain = PagedModel(make_tiny(architecture=architecture, **ARCHITECTURES[architecture]).bfloat16())
    packed = PagedModel(copy.deepcopy(plain.model))
    names = set(linears(plain, nn.Linear))
    packed.pack()
    assert not linears(packed, nn.Linear)
    assert set(linears(packed, PackedLinear)) == names
    wanted, found = logits(plain), logits(packed)
    # Two correct roundings of one product differ by an ulp, and the layers carry it on: as far as two sums of one order do.
    assert float((wanted - found).abs().max()) < 0.05 * float(wanted.std())


@needs_bf16
@pytest.mark.parametrize(("architecture", "shared"), [("llama", 3), ("qwen2", 3), ("gpt_neox", 1)])
def test_layers_that_read_one_input_share_a_product(architecture, shared):
    model = PagedModel(make_tiny(architecture=architecture, **ARCHITECTURES[architecture]).bfloat16())
    model.pack()
    sizes = {name.rsplit(".", 1)[-1]: len(m.product.sizes) for name, m in linears(model, PackedLinear).items()}
    if shared == 3:
        projections = {name: sizes[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj")}
        assert projections == {"q_proj": 3, "k_proj": 3, "v_proj": 3, "o_proj": 1, "gate_proj": 2, "down_proj": 1}
    else:
        assert set(sizes.values()) == {1}


class Reader(nn.Module):
    """Layers that look alike and may not be one product: a bias on one side only, another input, one used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.c, self.d = nn.Linear(8, 8), nn.Linear(8, 8)
        self.twice = nn.Linear(8, 8)
        self.never = nn.Linear(8, 8)
        self.tied = nn.Sequential(nn.Linear(8, 8))
        self.also_tied = self.tied[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x) + self.b(x)
        y = self.c(y) + self.d(y + 1)
        y = self.twice(self.twice(y))
        return self.also_tied(self.tied(y)) + self.never(y) * (len(x) > 1)


@needs_bf16
def test_only_layers_with_one_input_and_like_biases_are_joined():
    torch.manual_seed(0)
    plain = Reader().bfloat16().requires_grad_(False)
    packed = copy.deepcopy(plain)
    x = torch.randn(4, 8).bfloat16()
    assert pack_linears(packed, lambda: packed(x[:1])) == 6
    assert all(len(m.product.sizes) == 1 for m in packed.modules() if isinstance(m, PackedLinear))
    assert type(packed.also_tied) is nn.Linear
    for batch in (x[:1], x, x[:2]):
        torch.testing.assert_close(packed(batch).float(), plain(batch).float(), rtol=0.02, atol=0.02)


@needs_bf16
def test_two_inputs_in_turn_do_not_meet_in_a_shared_product():
    torch.manual_seed(0)

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(8, 6), nn.Linear(8, 10)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.left(x), self.right(y)], -1)

    plain = Pair().bfloat16().requires_grad_(False)
    packed = copy.deepcopy(plain)
    x, y = torch.randn(2, 4, 8).bfloat16()
    pack_linears(packed, lambda: packed(x, x))
    assert packed.left.product is packed.right.product
    for pair in ((x, x), (x, y), (y, x)):
        torch.testing.assert_close(packed(*pair).float(), plain(*pair).float(), rtol=0.02, atol=0.02)


def test_other_types_keep_their_weights():
    assert not can_pack(CPU, torch.float32)
    assert not can_pack(torch.device("meta"), torch.bfloat16)
    model = PagedModel(make_tiny())
    model.pack()
    assert not linears(model, PackedLinear)


@needs_bf16
def test_a_packed_model_generates():
    model = PagedModel(make_tiny().bfloat16())
    model.pack()
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    first, second = Engine(Verifier(model)).generate([[5, 6, 7], [8, 9]], params)
    assert len(first.token_ids) == len(second.token_ids) == 12


@needs_bf16
def test_the_file_that_the_plain_weights_lie_in_is_let_go(tmp_path: Path) -> None:
    """Checkpoints are mapped as a whole, so that a norm's weight alone would hold all of the plain weights in memory."""
    make_tiny().bfloat16().save_pretrained(tmp_path)
    options = {"dtype": "bfloat16", "self_check": False, "numerics": "fast"}
    plain = load_model(tmp_path, packed=False, **options)
    assert str(tmp_path) in Path("/proc/self/maps").read_text(encoding="utf-8")
    del plain
    gc.collect()
    model = load_model(tmp_path, **options)
    gc.collect()
    assert linears(model, PackedLinear)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(encoding="utf-8")
