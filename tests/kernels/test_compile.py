"""Every kernel compiled for Hopper (sm_90) on a machine without a GPU, by its own launch, which runs up to where it would start."""

from __future__ import annotations

import importlib
import itertools
import types

import pytest
import torch

from overdrive.ops.activation import ACTIVATIONS
from overdrive.ops.quantize import Mode, Quantization
from overdrive.ops.scaling import tenant_id
from overdrive.recipe import DelayedScaling

triton = pytest.importorskip("triton")

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SCALES, SLOTS = torch.ones(1024), torch.zeros(5, dtype=torch.int32)
PLAIN = Quantization(Mode.PLAIN, torch.bfloat16)
DELAYED = Quantization(Mode.DELAYED, E4M3, SCALES, SLOTS, 0, 0, col=True)
QUANTIZATIONS = {
    "plain": PLAIN,
    "delayed": DELAYED,
    "delayed e5m2": DELAYED._replace(dtype=E5M2, tenant=-1),
    "delayed row": DELAYED._replace(col=False),
    "delayed col": DELAYED._replace(row=False),
    "current": Quantization(Mode.CURRENT, E4M3, col=True, power_of_2=True),
    "block 1d": Quantization(Mode.BLOCK_1D, E4M3, col=True, power_of_2=True),
    "block 2d": Quantization(Mode.BLOCK_2D, E4M3, col=True),
}
X, GAMMA = torch.ones(48, 272, dtype=torch.bfloat16), torch.ones(272, dtype=torch.bfloat16)
STATS, SEED = torch.ones(48), torch.ones(1, dtype=torch.int64)


class Hopper:
    """What Triton asks a driver before a launch."""

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Forgetful(dict):
    """Compiles every launch anew: a held kernel would start."""

    def get(self, key):
        return None


@pytest.fixture
def compiled(monkeypatch):
    """The list of kernels that launches compiled."""
    jit, kernels = triton.runtime.jit.JITFunction, []
    run = jit.run

    def compile_only(self, *args, grid, warmup, **options):
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))
        if self.__name__ not in ("_norm_gemm", "_attend_cached"):  # whose products may be too small for them
            assert ("wgmma" in kernels[-1].asm["ptx"]) == (self.__name__ in ("_block_gemm", "_small_gemm", "_small_gemms"))
        return kernels[-1]

    monkeypatch.setattr(jit, "run", compile_only)
    monkeypatch.setattr(importlib.import_module("overdrive.kernels.launch"), "_held", Forgetful())
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)  # as a CPU tensor's get_device()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(importlib.import_module("overdrive.kernels.norm"), "sm_count", lambda device: 132)
    monkeypatch.setattr(importlib.import_module("overdrive.kernels.small_gemm"), "sm_count", lambda device: 132)
    monkeypatch.setattr(importlib.import_module("overdrive.kernels.norm_gemm"), "_gpu", lambda device: (132, 227 << 10))
    monkeypatch.setattr(importlib.import_module("overdrive.kernels.kv_cache"), "sm_count", lambda device: 132)
    triton.runtime.driver.set_active(Hopper())
    yield kernels
    triton.runtime.driver._active = None


def launch(family, function, *args):
    return getattr(importlib.import_module(f"overdrive.kernels.{family}"), function)(*args)


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_quantize(compiled, name):
    launch("quantize", "quantize", X, name.startswith("delayed"), *QUANTIZATIONS[name])
    assert len(compiled) == 1 + name.startswith("current")


def test_quantize_many_rows(compiled):
    """The bias gradient of more rows than one program can sum takes a second kernel."""
    launch("quantize", "quantize", X.repeat(50, 1), True, *DELAYED)
    assert len(compiled) == 2


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(compiled, name):
    launch("activation", "activation", X, name, 7.0, 1.702, *PLAIN)
    launch("activation", "activation_backward", X[:, : 272 // (1 + ACTIVATIONS[name].gated)], X, name, 7.0, 1.702, False, *PLAIN)


@pytest.mark.parametrize("mode", QUANTIZATIONS)
@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_quantized_activation(compiled, name, mode):
    q = QUANTIZATIONS[mode]
    launch("activation", "activation", X, name, 7.0, 1.702, *q)
    launch("activation", "activation_backward", X[:, : 272 // (1 + ACTIVATIONS[name].gated)], X, name, 7.0, 1.702, True, *q)
    if name == "swiglu":  # halves of whole scale blocks
        launch("activation", "activation_backward", X[:, :128], X[:, :256], name, 7.0, 1.702, True, *q)


@pytest.mark.parametrize("mode", ["plain", "delayed", "block 1d", "block 2d"])
def test_many_tiles_a_program(compiled, monkeypatch, mode):
    """In f32 they fill shared memory."""
    monkeypatch.setattr(importlib.import_module("overdrive.kernels.tile"), "_ENOUGH_PROGRAMS", 1)
    x = torch.ones(512, 256)
    launch("quantize", "quantize", x, True, *QUANTIZATIONS[mode])
    launch("activation", "activation_backward", x, x, "gelu", 7.0, 1.702, True, *QUANTIZATIONS[mode])
    launch("activation", "activation_backward", x[:, :128], x, "swiglu", 7.0, 1.702, True, *QUANTIZATIONS[mode])
    assert max(kernel.metadata.shared for kernel in compiled) <= 227 << 10


@pytest.mark.parametrize("mode", QUANTIZATIONS)
@pytest.mark.parametrize("rms", [False, True])
def test_norm(compiled, rms, mode):
    beta = None if rms else GAMMA
    launch("norm", "norm", X, GAMMA, beta, 1e-5, rms, rms, 0, *QUANTIZATIONS[mode])
    assert len(compiled) == (1 if mode in ("plain", "delayed", "delayed e5m2", "delayed row") else 2)


@pytest.mark.parametrize("cols", [16, 4096, 20000])
def test_norm_widths(compiled, cols):
    x, gamma = torch.ones(3, cols), torch.ones(cols)
    for mode in ("plain", "delayed row", "current"):
        launch("norm", "norm", x, gamma, gamma, 1e-5, False, False, 8, *QUANTIZATIONS[mode])
    launch("norm", "norm_backward", x, x, gamma, STATS[:3], STATS[:3], x, False, False, 8)
    launch("norm", "norm_backward", x, x, gamma, STATS[:3], STATS[:3], None, True, True, 0)


@pytest.mark.parametrize(
    ("tokens", "cols", "outputs"),
    [(1, 4096, 160), (2, 4096, 6144), (5, 48, 160), (8, 1024, 12288), (16, 4096, 12288), (16, 272, 28672), (20, 12288, 160)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_gemm(compiled, dtype, tokens, cols, outputs):
    """Tensor cores take what asynchronous copies bring: nothing else is read in the loop."""
    x, gamma, bias = torch.ones(tokens, cols, dtype=dtype), torch.ones(cols, dtype=dtype), torch.ones(outputs, dtype=dtype)
    weight = gamma.expand(outputs, cols)
    launch("norm_gemm", "norm_gemm", x, gamma, gamma, weight, bias, 1e-5, False, False)
    launch("norm_gemm", "norm_gemm", x, gamma.float(), None, weight, None, 1e-5, True, True)
    for kernel in compiled:
        loop = kernel.asm["ttgir"].split("ttg.async_wait", 1)[1].split("scf.yield", 1)[0]
        assert "ttg.async_copy_global_to_local" in loop
        assert "tt.load" not in loop
        assert "mma" in kernel.asm["ptx"]


@pytest.mark.parametrize(
    ("dtype", "heads", "groups", "dims"),
    [
        (torch.bfloat16, 4, 2, (64, 64)),
        (torch.bfloat16, 8, 1, (128, 128)),
        (torch.float16, 3, 1, (24, 8)),
        (torch.float32, 4, 2, (256, 192)),
    ],
)
def test_attend_cached(compiled, dtype, heads, groups, dims):
    lengths = torch.ones(3, 64, dtype=torch.int32)
    for batch, new in ((1, 1), (64, 1), (3, 4)):
        query, key, value = (
            torch.ones(batch, new, count, width, dtype=dtype)
            for count, width in ((heads, dims[0]), (groups, dims[0]), (groups, dims[1]))
        )
        caches = (torch.ones(1025, groups, width, dtype=dtype) for width in dims)
        held = (*lengths[:2, :batch], lengths[2:, :batch].t(), 1024)
        launch("kv_cache", "attend_cached", query, key, value, *caches, *held, True, new > 1, 0.1)
    assert len(compiled) == 5 + (64 * groups <= 132), "one kernel where the batch alone fills the GPU, else two"
    assert max(kernel.metadata.shared for kernel in compiled) <= 227 << 10
    assert not any(".local" in kernel.asm["ptx"] for kernel in compiled)


@pytest.mark.parametrize("p", [0.0, 2**-16, 0.1, 0.9])
def test_residual(compiled, p):
    seed = SEED if p else None
    launch("residual", "residual_add", X, GAMMA, X, p, seed)
    launch("residual", "residual_backward", X, p, seed, True)
    for q in (PLAIN, DELAYED, QUANTIZATIONS["delayed row"], QUANTIZATIONS["current"]):
        launch("residual", "residual_norm", X, None, X, p, seed, GAMMA, GAMMA, 1e-5, False, False, 0, *q)


@pytest.mark.parametrize("interleaved", [False, True])
def test_qkv_gradient(compiled, interleaved):
    for width, q in itertools.product((16, 64, 128), (PLAIN, DELAYED)):
        dq, dk = (torch.ones(4, 3, heads, width, dtype=torch.bfloat16) for heads in (4, 2))
        launch("qkv", "qkv_gradient", dq.transpose(0, 1), dk, dk, interleaved, True, *q)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(compiled, interleaved, transpose):
    product, half = torch.ones(5, 3, 10 * 128, dtype=torch.bfloat16), torch.ones(5, 3, 7 * 22)
    starts, bounds = torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)
    q, k = product[..., : 6 * 128].unflatten(2, (6, 128)), product[..., 6 * 128 : 8 * 128].unflatten(2, (2, 128))
    launch("rotary", "rotary", q, k, torch.ones(5, 1, 1, 128), None, None, interleaved, False, transpose)
    launch("rotary", "rotary", q.half(), None, torch.ones(5, 1, 1, 64), starts, None, interleaved, True, transpose)
    odd = half.unflatten(2, (7, 22))[:, :1]
    launch("rotary", "rotary", odd, odd[:, :, :3], torch.ones(5, 1, 1, 10), starts, bounds, interleaved, False, transpose)
    assert len(compiled) == 3


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
def test_begin_step(compiled, algorithm):
    tenant = tenant_id(DelayedScaling(amax_history_len=4, amax_compute_algo=algorithm), None)
    counter = torch.zeros(1, dtype=torch.int32)
    launch("scaling", "begin_step", counter, 1024, tenant)
    launch("scaling", "begin_step", counter, 1024, -1)
    assert len(compiled) == 2


@pytest.mark.parametrize(("with_bias", "out", "dtype"), [(True, torch.bfloat16, E4M3), (False, torch.float32, E5M2)])
def test_block_gemm(compiled, monkeypatch, with_bias, out, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    a, b = torch.ones(48, 400).to(dtype), torch.ones(272, 400).to(E4M3)
    scale_a, scale_b = torch.ones(4, 48).t(), torch.ones(3, 4)
    launch("gemm", "block_gemm", a, b, scale_a, scale_b, GAMMA if with_bias else None, out)
    assert len(compiled) == 1


@pytest.mark.parametrize("tokens", [64, 240, 4096])
@pytest.mark.parametrize("mode", [Mode.PLAIN, Mode.CURRENT, Mode.BLOCK_1D])
def test_small_gemm(compiled, mode, tokens):
    """Both operands of every product in flight, whichever way they lie."""
    cols, outputs, rows = 512, 128, -(-tokens // 16) * 16
    kind = torch.bfloat16 if mode == Mode.PLAIN else E4M3
    x, dy, weight = (torch.ones(size).to(kind) for size in ((rows, cols), (rows, outputs), (outputs, cols)))
    flipped = (t.t() if mode == Mode.PLAIN else t.t().contiguous() for t in (x, dy, weight))
    x_t, dy_t, weight_t = flipped
    other = Mode.BLOCK_2D if mode == Mode.BLOCK_1D else mode

    def scale(t, mode):
        if mode == Mode.PLAIN or mode.per_tensor:
            return None if mode == Mode.PLAIN else torch.ones(1)
        blocks = -(-t.shape[1] // 128)
        return (
            torch.ones(blocks, t.shape[0]).t() if mode == Mode.BLOCK_1D else torch.ones(-(-t.shape[0] // 128), -(-blocks // 4) * 4)
        )

    bias, total = torch.ones(outputs, dtype=torch.bfloat16), torch.ones(rows, outputs, dtype=torch.bfloat16)
    of_y, of_dx = (x, weight, scale(x, mode), scale(weight, other)), (dy, weight_t, scale(dy, mode), scale(weight_t, other))
    of_dw = (dy_t, x_t, scale(dy_t, mode), scale(x_t, mode))
    launch("small_gemm", "small_gemm", *of_y, bias, torch.bfloat16, mode, other, True, total)
    launch("small_gemm", "small_gemms", *of_dx, *of_dw, torch.bfloat16, mode, other, mode, mode, False, False)
    assert len(compiled) == 2
    for kernel in compiled:
        assert 0 < kernel.metadata.shared <= 227 << 10
        loops = kernel.asm["ttgir"].split("ttg.async_wait")[1:]
        assert len(loops) >= (1 if kernel is compiled[0] else 2)
        assert not any(".local" in line for line in kernel.asm["ptx"].splitlines() if not line.startswith("."))


@pytest.mark.parametrize(("cols", "launches"), [(272, 1), (1024, 1), (1040, 2)])
def test_norm_of_few_elements_takes_one_launch(compiled, cols, launches):
    x, gamma = torch.ones(48, cols, dtype=torch.bfloat16), torch.ones(cols)
    launch("norm", "norm", x, gamma, gamma, 1e-5, False, False, 0, *DELAYED)
    assert len(compiled) == launches
    launch("norm", "norm", x.repeat(1000, 1), gamma, gamma, 1e-5, False, False, 0, *DELAYED)
    launch("norm", "norm", x, gamma, gamma, 1e-5, False, False, 8, *DELAYED)
    assert len(compiled) == launches + 4
