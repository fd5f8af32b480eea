"""The 4-bit base of QLoRA."""
import pytest
import torch
from torch import nn

from minillm.lora import add_lora, merge_lora
from minillm.nf4 import NF4, NF4Linear, nf4_dequantize, nf4_quantize, to_nf4
from minillm.tests.test_lora import ids, model

PAPER = [                                                      # Dettmers et al. 2023, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def test_nf4_has_the_values_of_the_paper():
    assert (NF4 - torch.tensor(PAPER)).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(64, 64), (3, 5), (7, 64), (1, 1), (128, 200)])
def test_nf4_takes_the_nearest_value(shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, scales = nf4_quantize(w)
    n = -(-w.numel() // 64) * 64
    assert codes.dtype == torch.uint8 and codes.shape == (n // 2,) and scales.shape == (n // 64,)
    back = nf4_dequantize(codes, scales, shape)
    per_weight = scales.repeat_interleave(64)[:w.numel()].view(shape)
    nearest = (w[..., None] - per_weight[..., None] * NF4).abs().amin(-1)
    assert back.shape == shape and ((back - w).abs() - nearest).abs().max() < 1e-6


def test_nf4_of_zeros_of_one_value_and_twice():
    for w in (torch.zeros(4, 32), torch.full((4, 32), -0.3), torch.full((2, 64), 1e-38)):
        back = nf4_dequantize(*nf4_quantize(w), w.shape)
        assert torch.allclose(back, w, atol=1e-7) and back.isfinite().all()
    # two indices of the value 0, not of 0 / 0
    assert (nf4_quantize(torch.zeros(4, 32))[0] == 0x77).all()
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    once = nf4_dequantize(*nf4_quantize(w), w.shape)
    assert torch.equal(nf4_dequantize(*nf4_quantize(once), w.shape), once)


def test_gradients_pass_a_4_bit_layer_and_it_keeps_no_weight():
    linear = nn.Linear(64, 96, bias=False)
    packed = NF4Linear(linear)
    kept, x = [], torch.randn(5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = packed(x)
    y.backward(torch.ones_like(y))
    assert torch.allclose(y, x @ packed.weight.T, atol=1e-5)
    assert torch.allclose(x.grad, torch.ones(5, 96) @ packed.weight, atol=1e-5)
    assert sum(t.numel() for t in kept) < 64 * 96 / 2
    assert not list(packed.parameters())


@torch.no_grad()
def test_a_4_bit_base_can_be_merged():
    m = add_lora(to_nf4(model()), 4, 8)
    for n, p in m.named_parameters():
        if "lora_B" in n:
            nn.init.normal_(p, std=0.1)
    before = m(ids())
    merge_lora(m)
    assert (m(ids()) - before).abs().max() < 1e-4
    assert m.state_dict().keys() == model().state_dict().keys()


def test_a_bias_has_no_place_in_4_bits():
    with pytest.raises(ValueError, match="bias"):
        NF4Linear(nn.Linear(64, 64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(bad):
    m = model()
    with torch.no_grad():
        m.model.layers[1].mlp.up_proj.weight[3, 3] = bad
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj has weights that are not finite"):
        to_nf4(m)
    assert not any(isinstance(layer, NF4Linear) for layer in m.modules())
