"""MultiheadAttention: values and gradients against float64, parameter layouts, returns, bad inputs."""

from __future__ import annotations

import pytest
import torch

from overdrive.modules.multihead_attention import MultiheadAttention
from tests.modules import attention_oracle as oracle
from tests.numerics import assert_close

HIDDEN, HEADS = 32, 4


def build(device, dtype=torch.float32, **arguments):
    """In training mode, without dropout, every parameter random."""
    module = MultiheadAttention(HIDDEN, HEADS, attention_dropout=0.0, params_dtype=dtype, device=device, **arguments)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return module


def doubles(module):
    return {name: p.detach().cpu().double().requires_grad_() for name, p in module.named_parameters()}


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        ({"input_layernorm": True}, torch.float32),
        ({"input_layernorm": True, "fuse_qkv_params": True}, torch.bfloat16),
        ({"input_layernorm": True, "fuse_qkv_params": True, "qkv_weight_interleaved": False}, torch.float16),
        ({"num_gqa_groups": 2, "fuse_qkv_params": True}, torch.float32),
        ({"num_gqa_groups": 1, "fuse_qkv_params": True}, torch.float32),
        ({"num_gqa_groups": 2, "input_layernorm": True}, torch.float32),
        ({"num_gqa_groups": 1, "bias": False, "qkv_format": "bshd"}, torch.bfloat16),
        ({"kv_channels": 12, "attn_mask_type": "no_mask", "qkv_format": "bshd"}, torch.float32),
        ({"normalization": "RMSNorm", "input_layernorm": True, "attn_mask_type": "padding"}, torch.float32),
        ({"return_bias": True, "return_layernorm_output": True, "input_layernorm": True}, torch.float32),
    ],
)
def test_against_float64(arguments, dtype, device):
    module = build(device, dtype, **arguments)
    layout, mask_type = arguments.get("qkv_format", "sbhd"), arguments.get("attn_mask_type", "causal")
    x = torch.randn(7, 3, HIDDEN).to(device, dtype).requires_grad_()
    batch = x.shape[layout.index("b")]
    mask = (
        (torch.arange(x.shape[layout.index("s")]) >= torch.tensor([5, 7, 0])[:, None])[:, None, None]
        if mask_type == "padding"
        else None
    )
    out = module(x, None if mask is None else mask.to(device))
    dout = torch.randn(x.shape).to(dtype)

    p, x64 = doubles(module), x.detach().cpu().double().requires_grad_()
    interleaved = arguments.get("fuse_qkv_params", False) and arguments.get("qkv_weight_interleaved", True)
    shape = (HEADS, arguments.get("num_gqa_groups", HEADS), arguments.get("kv_channels", HIDDEN // HEADS))
    want, bias, normed = oracle.multihead(x64, p, *shape, layout, mask_type, mask, interleaved)
    assert batch == (3 if layout == "sbhd" else 7)
    if arguments.get("return_bias"):
        out, out_bias, norm_out = out
        assert torch.equal(out_bias, module.proj.bias)
        assert_close(norm_out, normed.detach(), dtype, what="norm output")
    else:
        want = want + bias
    assert_close(out, want.detach(), dtype, what="out", depth=4)
    out.backward(dout.to(device))
    want.backward(dout.double())
    assert_close(x.grad, x64.grad, dtype, what="dx", depth=8)
    for name, parameter in module.named_parameters():
        if "key_bias" in name:  # a constant added to all keys changes no probability: the gradient is zero but for rounding
            assert parameter.grad.double().norm() < 2e-2 * (1 if dtype != torch.float32 else 1e-2)
        elif parameter.grad is not None and p[name].grad is not None:
            assert_close(parameter.grad, p[name].grad, dtype, what=name, depth=8)


def test_parameter_names():
    def names(**arguments):
        return sorted(name for name, _ in build("cpu", **arguments).named_parameters())

    assert names(fuse_qkv_params=True, bias=False) == ["proj.weight", "qkv.weight"]
    assert names(input_layernorm=True) == sorted(
        [f"layernorm_qkv.{part}" for part in ("layer_norm_weight", "layer_norm_bias")]
        + [f"layernorm_qkv.{part}_{kind}" for part in ("query", "key", "value") for kind in ("weight", "bias")]
        + ["proj.weight", "proj.bias"]
    )
    module = build("cpu", num_gqa_groups=2)
    assert [tuple(getattr(module.qkv, f"{part}_weight").shape) for part in ("query", "key", "value")] == [
        (32, 32),
        (16, 32),
        (16, 32),
    ]
    assert build("cpu", num_gqa_groups=2, fuse_qkv_params=True).qkv.weight.shape == (64, 32)


def test_returns():
    x = torch.randn(5, 2, HIDDEN)
    assert isinstance(build("cpu")(x), torch.Tensor)
    assert len(build("cpu", return_bias=True)(x)) == 2
    assert len(build("cpu", return_bias=True, input_layernorm=True, return_layernorm_output=True)(x)) == 3
    assert len(build("cpu", input_layernorm=True, return_layernorm_output=True)(x)) == 2
    out, bias = build("cpu", return_bias=True, bias=False)(x)
    assert out.shape == x.shape
    assert bias is None


def test_qkv_views_are_not_copied(device):
    module = build(device, input_layernorm=True)
    seen = []
    module.core_attention.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[:3]))
    module(torch.randn(5, 2, HIDDEN, device=device))
    assert len({x.untyped_storage().data_ptr() for x in seen}) == 1


def test_per_call_mask_type(device):
    x = torch.randn(5, 2, HIDDEN, device=device)
    causal = build(device)
    full = build(device, attn_mask_type="no_mask")
    full.load_state_dict(causal.state_dict())
    assert torch.equal(causal(x, attn_mask_type="no_mask"), full(x))
    assert not torch.equal(causal(x), full(x))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden_size": 33}, ValueError, "hidden_size=33 must be a multiple of num_attention_heads=4"),
        ({"num_gqa_groups": 3}, ValueError, "num_attention_heads=4 must be a multiple of num_gqa_groups=3"),
        ({"normalization": "BatchNorm"}, ValueError, "normalization must be one of 'LayerNorm', 'RMSNorm'; got 'BatchNorm'"),
        ({"attn_mask_type": "diagonal"}, ValueError, "attn_mask_type must be one of"),
        ({"qkv_format": "thd"}, NotImplementedError, "qkv_format='thd'"),
        ({"qkv_format": "hdsb"}, ValueError, "qkv_format must be one of"),
        ({"attention_type": "cross"}, NotImplementedError, "attention_type='cross'"),
        ({"qk_norm_type": "L1Normalization"}, ValueError, "qk_norm_type must be one of"),
        ({"layer_number": 0}, ValueError, "layer_number must be at least 1"),
        ({"tp_size": 4}, NotImplementedError, "tp_size=4"),
        ({"ub_bulk_wgrad": True}, NotImplementedError, "ub_bulk_wgrad"),
        ({"attention_dropout": 2}, ValueError, "attention_dropout must be a probability"),
    ],
)
def test_bad_constructor_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        MultiheadAttention(**{"hidden_size": HIDDEN, "num_attention_heads": HEADS, "device": "cpu", **arguments})


def test_bad_inputs():
    module, x = build("cpu"), torch.randn(5, 2, HIDDEN)
    with pytest.raises(ValueError, match=r"hidden_states must be \[s, b, hidden_size=32\], got shape \[5, 32\]"):
        module(x[:, 0])
    with pytest.raises(ValueError, match="in_features=32"):
        module(x[..., :16])
    with pytest.raises(TypeError, match=r"torch\.float64"):
        module(x.double())
    with pytest.raises(ValueError, match="rotary_pos_emb must be"):
        module(x, rotary_pos_emb=torch.zeros(1))
    with pytest.raises(NotImplementedError, match="encoder_output"):
        module(x, encoder_output=x)
