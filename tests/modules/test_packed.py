"""Packed sequences (format thd) through layers: values and gradients are those of each sequence alone."""

from __future__ import annotations

import pytest
import torch

import overdrive.pytorch as te
from tests.modules.layer_oracle import fp8
from tests.numerics import assert_close, assert_same_bits, relative_error

HIDDEN, FFN, HEADS, DIM = 32, 48, 4, 8
LENGTHS, ENCODED = (5, 1, 0, 9), (4, 2, 3, 0)
SPARE = 3  # tokens of no sequence, at the end


class Packing:
    """Sequences of some lengths packed end to end, or with `gap` tokens of padding behind each."""

    def __init__(self, lengths, device, gap=0):
        self.lengths, self.device = lengths, device
        self.cu_seqlens = self._sums(lengths)
        self.padded = self._sums([length + gap for length in lengths]) if gap else None
        starts = (self.cu_seqlens if self.padded is None else self.padded).tolist()
        self.tokens = starts[-1] + SPARE
        self.parts = [slice(start, start + length) for start, length in zip(starts, lengths)]

    def _sums(self, lengths):
        return torch.tensor([0, *lengths], device=self.device).cumsum(0, dtype=torch.int32)

    def inside(self):
        """bool [tokens, 1]: True in a sequence."""
        inside = torch.zeros(self.tokens, 1, dtype=torch.bool, device=self.device)
        for part in self.parts:
            inside[part] = True
        return inside

    def draw(self, dtype=torch.float32, width=HIDDEN):
        """Random tokens, in the padding too."""
        return torch.randn(self.tokens, width).to(self.device, dtype)


def call_of(query, key=None):
    """The arguments that say how tokens lie."""
    key = query if key is None else key
    call = {"cu_seqlens_q": query.cu_seqlens, "cu_seqlens_kv": key.cu_seqlens}
    call |= {"max_seqlen_q": max(query.lengths), "max_seqlen_kv": max(key.lengths)}
    if query.padded is not None:
        call |= {"cu_seqlens_q_padded": query.padded, "cu_seqlens_kv_padded": key.padded, "pad_between_seqs": True}
    return call


def randomize(module):
    """No parameter trivial."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            gain = "norm_weight" in name or "_norm.weight" in name or name == "layernorm.weight"
            parameter.normal_(1.0 if gain else 0.0, 0.2)


def layers(device, dtype=torch.float32, hidden=HIDDEN, ffn=FFN, **arguments):
    """A TransformerLayer of packed sequences, and one of the same weights for a batch [1, S, hidden]."""
    options = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "params_dtype": dtype, "device": device, **arguments}
    packed = te.TransformerLayer(hidden, ffn, HEADS, attn_input_format="thd", **options)
    for name in ("self_attn_mask_type", "enc_dec_attn_mask_type"):
        options[name] = unpadded(options.get(name, "causal" if "self" in name else "no_mask"))
    alone = te.TransformerLayer(hidden, ffn, HEADS, attn_input_format="bshd", **options)
    randomize(packed)
    alone.load_state_dict(packed.state_dict())
    return packed, alone


def unpadded(mask_type):
    """The mask type that means the same of one sequence without padding."""
    return mask_type.removeprefix("padding_") if "_" in mask_type else mask_type.replace("padding", "no_mask")


def gradients(module):
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def check(packed, alone, query, dtype, depth, key=None, call=None, call_of_one=lambda index: {}):
    """Forward and backward of `packed`, against `alone` run with each sequence; `key`: how the encoder's output lies.

    call_of_one: further arguments of `alone` for the sequence of that index, as `call` are of `packed`.
    """
    x, dout = query.draw(dtype).requires_grad_(), query.draw(dtype) * query.inside()
    encoder = None if key is None else key.draw(dtype).requires_grad_()
    given = {} if encoder is None else {"encoder_output": encoder}
    out = packed(x, **given, **call_of(query, key), **(call or {}))
    assert out.shape == x.shape
    assert out.dtype == dtype
    out.backward(dout)
    leaves = [leaf.detach().requires_grad_() for leaf in (x, *given.values())]
    for index, part in enumerate(query.parts):
        if not query.lengths[index]:
            continue
        one = {} if key is None else {"encoder_output": leaves[1][None, key.parts[index]]}
        want = alone(leaves[0][None, part], **one, **call_of_one(index))
        assert_close(out[part], want[0].detach().double().cpu(), dtype, what=f"out of sequence {index}", depth=depth)
        want.backward(dout[None, part])
    for name, grad, leaf in zip(("hidden_states", "encoder_output"), (x.grad, None if encoder is None else encoder.grad), leaves):
        assert_close(grad, leaf.grad.double().cpu(), dtype, what=f"gradient of {name}", depth=2 * depth)
    expected = gradients(alone)
    for name, grad in gradients(packed).items():
        if "key_bias" not in name:  # a constant added to all keys changes nothing, its gradient is rounding
            assert_close(grad, expected[name].double().cpu(), dtype, what=f"gradient of {name}", depth=2 * depth)


MODES = {
    "": {},
    "post": {"apply_residual_connection_post_layernorm": True},
    "output": {"output_layernorm": True},
    "parallel": {"parallel_attention_mlp": True},
}


@pytest.mark.parametrize("gap", [0, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        ({}, torch.float32),
        ({"fuse_qkv_params": True, "num_gqa_groups": 2, "activation": "swiglu", "normalization": "RMSNorm"}, torch.float32),
        ({"fuse_qkv_params": True, "num_gqa_groups": 1, "bias": False}, torch.float32),
        ({"kv_channels": 6, "zero_centered_gamma": True, "fuse_qkv_params": True}, torch.bfloat16),
        ({"num_gqa_groups": 2, "softmax_type": "learnable"}, torch.float32),
    ],
)
def test_layers_are_those_of_each_sequence(arguments, dtype, mode, gap, device):
    check(*layers(device, dtype, **MODES[mode], **arguments), Packing(LENGTHS, device, gap), dtype, depth=6)


@pytest.mark.parametrize("gap", [0, 2])
@pytest.mark.parametrize(
    ("mask_type", "window"),
    [
        ("no_mask", None),
        ("no_mask", (1, 2)),
        ("padding", (3, 1)),
        ("causal", (2, 0)),
        ("padding_causal", None),
        ("padding,causal", None),
        ("causal_bottom_right", None),
        ("padding_causal_bottom_right", (2, 0)),
    ],
)
def test_masks(mask_type, window, gap, device):
    pair = layers(device, self_attn_mask_type=mask_type.replace(",", "_"), window_size=window)
    check(*pair, Packing(LENGTHS, device, gap), torch.float32, depth=6, call={"self_attn_mask_type": mask_type})


NORMS = ({}, {"qk_norm_type": "RMSNorm"}, {"qk_norm_type": "L2Normalization", "qk_norm_before_rope": True})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gap", [0, 2])
@pytest.mark.parametrize("how", ["one", "pair", "interleaved", "partial"])
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_rotary_embeddings_begin_again_with_each_sequence(norm, how, gap, dtype, device):
    options = {"rotary_pos_interleaved": how == "interleaved", "num_gqa_groups": 2, **norm}
    angles = te.RotaryPositionEmbedding(DIM, 0.5 if how == "partial" else 1.0, interleaved=how == "interleaved").to(device)
    freqs = angles(max(LENGTHS) + gap)
    turn = {"rotary_pos_emb": (freqs, freqs.clone()) if how == "pair" else freqs}
    pair = layers(device, dtype, **options)
    check(*pair, Packing(LENGTHS, device, gap), dtype, depth=8, call=turn, call_of_one=lambda _: turn)


@pytest.mark.parametrize("kind", ["alibi", "pre_scale_bias", "post_scale_bias"])
def test_biases(kind, device):
    longest = max(LENGTHS)
    bias = None if kind == "alibi" else torch.randn(len(LENGTHS), HEADS, longest, longest, device=device)

    def one(index):
        part = None if bias is None else bias[index : index + 1, :, : LENGTHS[index], : LENGTHS[index]]
        return {"core_attention_bias_type": kind, "core_attention_bias": part}

    given = {"core_attention_bias_type": kind, "core_attention_bias": bias}
    check(*layers(device), Packing(LENGTHS, device, 2), torch.float32, depth=6, call=given, call_of_one=one)


@pytest.mark.parametrize("gap", [0, 2])
@pytest.mark.parametrize("mode", ["", "post", "output"])
@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        ({}, torch.float32),
        ({"fuse_qkv_params": True, "num_gqa_groups": 2}, torch.float32),
        ({"enc_dec_attn_mask_type": "padding", "self_attn_mask_type": "padding_causal"}, torch.bfloat16),
        ({"enc_dec_attn_mask_type": "padding_causal_bottom_right", "num_gqa_groups": 1}, torch.float32),
        ({"enc_dec_attn_mask_type": "no_mask", "enc_dec_window_size": (1, 1)}, torch.float32),
    ],
)
def test_decoders_have_lengths_of_both_sides(arguments, dtype, mode, gap, device):
    pair = layers(device, dtype, layer_type="decoder", **MODES[mode], **arguments)
    check(*pair, Packing(LENGTHS, device, gap), dtype, depth=8, key=Packing(ENCODED, device, gap))


def test_cross_attention_turns_queries_and_keys_by_their_own_places(device):
    options = {"attention_type": "cross", "attn_mask_type": "no_mask", "attention_dropout": 0.0, "device": device}
    packed, alone = (te.MultiheadAttention(HIDDEN, HEADS, qkv_format=layout, **options) for layout in ("thd", "bshd"))
    randomize(packed)
    alone.load_state_dict(packed.state_dict())
    angles = te.RotaryPositionEmbedding(DIM).to(device)
    turn = {"rotary_pos_emb": (angles(max(LENGTHS)), angles(max(ENCODED), offset=2))}
    query, key = Packing(LENGTHS, device), Packing(ENCODED, device)
    check(packed, alone, query, torch.float32, 4, key, turn, lambda _: turn)


@pytest.mark.parametrize("return_bias", [False, True])
@pytest.mark.parametrize("norm", [{}, {"input_layernorm": True, "return_layernorm_output": True}])
def test_what_attention_returns(return_bias, norm, device):
    options = {"attention_dropout": 0.0, "device": device, "return_bias": return_bias, **norm}
    packed, alone = (te.MultiheadAttention(HIDDEN, HEADS, qkv_format=layout, **options) for layout in ("thd", "bshd"))
    alone.load_state_dict(packed.state_dict())
    query = Packing((7,), device)
    x = query.draw()
    outputs, want = packed(x, **call_of(query)), alone(x[None, :7])
    if not isinstance(outputs, tuple):
        outputs, want = (outputs,), (want,)
    assert len(outputs) == len(want) == 1 + return_bias + bool(norm)
    for output, expected in zip(outputs, want):
        expected = expected if expected.dim() == 1 else expected[0]
        assert_close(output[:7], expected[:7].detach().double().cpu(), torch.float32, depth=4)


@pytest.mark.parametrize("recipe", ["delayed", "current", "block"])
@pytest.mark.parametrize("mode", MODES)
def test_fp8_of_equal_lengths_is_that_of_the_batch(recipe, mode, device):
    """The same tokens in the same order meet the same scales."""
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 GEMMs need compute capability 8.9")
    packed, alone = layers(device, torch.bfloat16, 128, 256, num_gqa_groups=2, **MODES[mode])
    x, dout = (torch.randn(2, 24, 128).to(device, torch.bfloat16) for _ in range(2))
    bounds = torch.tensor([0, 24, 48], dtype=torch.int32, device=device)
    inputs = [x.detach().flatten(0, 1).requires_grad_(), x.detach().requires_grad_()]
    for _ in range(2):  # delayed scaling knows the amaxes from the first on
        outputs = []
        for module, leaf, call in zip((packed, alone), inputs, ({"cu_seqlens_q": bounds, "cu_seqlens_kv": bounds}, {})):
            module.zero_grad()
            leaf.grad = None
            with fp8(recipe):
                outputs.append(module(leaf, **call))
            outputs[-1].backward(dout.view(leaf.shape))
    assert_close(outputs[0], outputs[1].detach().flatten(0, 1).double().cpu(), torch.bfloat16, depth=6)
    # a last bit of attention's output, which on a GPU another backend gives, may round to another FP8 value
    assert relative_error(inputs[0].grad, inputs[1].grad.flatten(0, 1)) < 0.06
    expected = gradients(alone)
    for name, grad in gradients(packed).items():
        assert "key_bias" in name or relative_error(grad, expected[name]) < 0.06, name


@pytest.mark.filterwarnings("ignore:.*FP8 GEMMs need token counts divisible by 16:UserWarning")
@pytest.mark.parametrize("recipe", ["delayed", "current", "block"])
@pytest.mark.parametrize("gap", [0, 3])
def test_fp8_of_ragged_sequences(recipe, gap, device):
    """A number of tokens that FP8 GEMMs do not take; against the sequences alone in high precision."""
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 GEMMs need compute capability 8.9")
    packed, alone = layers(device, torch.bfloat16, 128, 256, num_gqa_groups=2)
    with torch.no_grad():
        for pair in zip(packed.parameters(), alone.parameters()):
            for parameter in pair:
                parameter.mul_(0.5 if parameter.dim() == 2 else 1)  # neither blows up nor shrinks
    query = Packing((21, 1, 0, 40), device, gap)
    x, dout = query.draw(torch.bfloat16, 128).requires_grad_(), query.draw(torch.bfloat16, 128) * query.inside()
    for _ in range(2):
        packed.zero_grad()
        x.grad = None
        with fp8(recipe):
            out = packed(x, **call_of(query))
        out.backward(dout)
    leaf = x.detach().requires_grad_()
    for part in query.parts:
        want = alone(leaf[None, part])
        want.backward(dout[None, part])
        assert part.start == part.stop or 1e-3 < relative_error(out[part], want[0]) < 0.2
    assert 1e-3 < relative_error(x.grad, leaf.grad) < 0.25
    expected = gradients(alone)
    for name, grad in gradients(packed).items():
        assert "key" in name or "query" in name or relative_error(grad, expected[name]) < 0.3, name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("gap", [0, 2])
@pytest.mark.parametrize("arguments", [{}, {"layer_type": "decoder"}, MODES["parallel"]], ids=str)
def test_compiles_to_one_graph_with_the_same_numbers(arguments, gap, device):
    layer, _ = layers(device, num_gqa_groups=2, fuse_qkv_params=True, **arguments)
    query, key = Packing(LENGTHS, device, gap), Packing(ENCODED, device, gap)
    decodes = "layer_type" in arguments
    call = call_of(query, key) | {"encoder_output": key.draw()} if decodes else call_of(query)
    call["rotary_pos_emb"] = te.RotaryPositionEmbedding(DIM).to(device)(max(LENGTHS) + gap)
    x, dout, results = query.draw(), query.draw(), []
    torch.compiler.reset()
    for module in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaf = x.detach().requires_grad_()
        layer.zero_grad()
        out = module(leaf, **call)
        out.backward(dout)
        results.append({"out": out.detach(), "dx": leaf.grad, **gradients(layer)})
    for name, want in results[0].items():
        assert "key_bias" in name or relative_error(results[1][name], want) < 2e-6, name


def test_checkpointed_attention(device):
    layer, _ = layers(device)
    query = Packing(LENGTHS, device, 2)
    x, dout, results = query.draw(), query.draw(), []
    for again in (False, True):
        leaf = x.detach().requires_grad_()
        layer(leaf, checkpoint_core_attention=again, **call_of(query)).backward(dout)
        results.append(leaf.grad)
    assert_same_bits(*results)


def test_drop_path_drops_whole_sequences(device):
    lengths = [1 + index % 3 for index in range(64)]
    layer, _ = layers(device, drop_path_rate=0.5)
    for gap in (0, 1):
        query = Packing(lengths, device, gap)
        x = query.draw()
        same = (layer(x, **call_of(query)) == x).all(-1)
        whole = [same[part].all().item() for part in query.parts]
        assert all(same[part].any().item() == every for part, every in zip(query.parts, whole))
        assert 4 <= sum(whole) <= 32  # of 64, expecting 16 whose two branches both drop
        assert torch.equal(layer.eval()(x, **call_of(query)), layer(x, **call_of(query)))
        layer.train()


def test_dropout_follows_the_seed(device):
    layer, _ = layers(device, hidden_dropout=0.3, attention_dropout=0.3)
    query = Packing(LENGTHS, device)
    x = query.draw()
    torch.manual_seed(1)
    first, second = layer(x, **call_of(query)), layer(x, **call_of(query))
    torch.manual_seed(1)
    assert torch.equal(layer(x, **call_of(query)), first)
    assert not torch.equal(first, second)


def test_no_tokens(device):
    layer, _ = layers(device)
    bounds = torch.zeros(3, dtype=torch.int32, device=device)
    x = torch.zeros(0, HIDDEN, device=device, requires_grad=True)
    out = layer(x, cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    out.sum().backward()
    assert out.shape == (0, HIDDEN)


# --- bad input ----------------------------------------------------------------------------------------------------------


def offsets(*values):
    return torch.tensor(values, dtype=torch.int32)


BAD = [
    ({"cu_seqlens_q": None, "cu_seqlens_kv": None}, ValueError, "cu_seqlens_q and cu_seqlens_kv must be given with .*'thd'"),
    ({"cu_seqlens_kv": None}, ValueError, "cu_seqlens_q and cu_seqlens_kv must be given with .*'thd'"),
    ({"cu_seqlens_q": offsets(0, 5, 3)}, ValueError, r"cu_seqlens_q must start at 0 and never fall \(monotonic\).*\[0, 5, 3\]"),
    ({"cu_seqlens_kv": offsets(0, 3, 7).long()}, TypeError, "cu_seqlens_kv must be an int32 tensor .*torch.int64"),
    ({"cu_seqlens_q": [0, 3, 7]}, TypeError, "cu_seqlens_q must be an int32 tensor .*list"),
    ({"cu_seqlens_q": offsets(0, 3, 8)}, ValueError, "cu_seqlens_q ends at 8, but there are 7 tokens"),
    ({"cu_seqlens_kv": offsets(0, 7)}, ValueError, r"cu_seqlens_kv must be \[2 \+ 1\]"),
    ({"max_seqlen_q": 3}, ValueError, "cu_seqlens_q has a sequence of 4 tokens, more than max_seqlen_q=3"),
    ({"pad_between_seqs": True}, ValueError, "pad_between_seqs=True needs cu_seqlens_q_padded"),
    ({"cu_seqlens_q_padded": offsets(0, 4, 8)}, ValueError, "cu_seqlens_q_padded ends at 8, but there are 7 tokens"),
    ({"attention_mask": torch.zeros(2, 1, 1, 4, dtype=torch.bool)}, ValueError, "attention_mask .*qkv_format='thd'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
@pytest.mark.parametrize("turned", [False, True])
def test_bad_packings(arguments, error, message, turned):
    layer, _ = layers("cpu")
    call = {"cu_seqlens_q": offsets(0, 3, 7), "cu_seqlens_kv": offsets(0, 3, 7), **arguments}
    freqs = te.RotaryPositionEmbedding(DIM)(8).cpu() if turned else None
    with pytest.raises(error, match=message):
        layer(torch.randn(7, HIDDEN), rotary_pos_emb=freqs, **call)


def test_bad_packings_of_decoders():
    layer, _ = layers("cpu", layer_type="decoder")
    x, encoder, bounds = torch.randn(7, HIDDEN), torch.randn(5, HIDDEN), {"cu_seqlens_q": offsets(0, 3, 7)}
    with pytest.raises(ValueError, match="cu_seqlens_kv ends at 6, but there are 5 tokens"):
        layer(x, encoder_output=encoder, **bounds, cu_seqlens_kv=offsets(0, 3, 6))
    with pytest.raises(ValueError, match="cu_seqlens_q and cu_seqlens_kv must be given"):
        layer(x, encoder_output=encoder, **bounds)
    with pytest.raises(ValueError, match=r"encoder_output must be \[any length, hidden_size=32\].*got shape \[5, 1, 32\]"):
        layer(x, encoder_output=encoder[:, None], **bounds, cu_seqlens_kv=offsets(0, 3, 5))


def test_bad_shapes_and_angles():
    layer, _ = layers("cpu")
    with pytest.raises(ValueError, match=r"hidden_states must be \[t, hidden_size=32\].*got shape \[7, 1, 32\]"):
        layer(torch.randn(7, 1, HIDDEN))
    bounds, freqs = offsets(0, 2, 7), te.RotaryPositionEmbedding(DIM)(4).cpu()
    with pytest.raises(ValueError, match="rotary_pos_emb has 4 positions, the sequence 5"):
        layer(torch.randn(7, HIDDEN), cu_seqlens_q=bounds, cu_seqlens_kv=bounds, rotary_pos_emb=freqs)
    padded = {"cu_seqlens_q_padded": bounds, "cu_seqlens_kv_padded": bounds}
    with pytest.raises(ValueError, match="rotary_pos_emb has 4 positions, the sequence 5"):  # NaN in the gradient otherwise
        layer(torch.randn(7, HIDDEN), cu_seqlens_q=offsets(0, 2, 4), cu_seqlens_kv=offsets(0, 2, 4), rotary_pos_emb=freqs, **padded)


def test_drop_path_with_a_cache_is_refused(device):
    layer, _ = layers(device, drop_path_rate=0.5, layer_number=1)
    params = te.InferenceParams(2, 8, HEADS, DIM, torch.float32, device=device)
    params.pre_step({"a": 3, "b": 4})
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"drop_path_rate=0\.5 is on, and inference_params is for inference"):
        layer.train()(torch.randn(7, HIDDEN, device=device), inference_params=params)
