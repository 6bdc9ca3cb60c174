"""Numbers of kernels on a machine without a GPU: Triton's interpreter runs them, as far as it can (no FP8, no bf16 products)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SMALL_GEMM = """
import importlib, itertools
import torch
from overdrive.ops.gemm import dequantize
from overdrive.ops.quantize import Mode, new_block_scales

launch = importlib.import_module("overdrive.kernels.launch")
kernel = importlib.import_module("overdrive.kernels.small_gemm")
kernel.sm_count = lambda device: 132
torch._C._cuda_getDevice = lambda: -1  # as a CPU tensor's get_device()

class Forgetful(dict):
    def get(self, key):
        return None

launch._held = Forgetful()

def close(out, a, b, more=0.0):
    torch.testing.assert_close(out.double(), a.double() @ b.double().t() + more, rtol=1e-5, atol=2e-4)

for m, n, k in ((64, 16, 16), (80, 48, 144), (130, 208, 304)):
    a, b, dy, bias = torch.randn(m, k).half(), torch.randn(n, k).half(), torch.randn(m, n).half(), torch.randn(n).half()
    total = torch.randn(n, m).half().t()
    for x, y in itertools.product((a, a.t().contiguous().t()), (b, b.t().contiguous().t())):
        out = kernel.small_gemm(x, y, None, None, bias, torch.float32, Mode.PLAIN, Mode.PLAIN, False, total)
        close(out, a, b, bias.double() + total)
    dx, dw = kernel.small_gemms(dy, b.t(), None, None, dy.t(), a.t(), None, None, torch.float32, *(Mode.PLAIN,) * 4, False, False)
    close(dx, dy, b.t())
    close(dw, dy.t(), a.t())
    kernel._FAR, seen, run = 2 * m * k, [], launch.Launcher.__call__
    launch.Launcher.__call__ = lambda self, grid, device, args, tail: seen.append(args) or run(self, grid, device, args, tail)
    far = torch.cat([a, a, a], 1)[:, :k]  # strides as of a matrix too large for 32 bits
    close(kernel.small_gemm(far, b, None, None, None, torch.float32, Mode.PLAIN, Mode.PLAIN, False, None), a, b)
    assert seen[0][2:4] == (k, 1)
    kernel._FAR, launch.Launcher.__call__ = 2**30, run
    for mode_a, mode_b in ((Mode.BLOCK_1D, Mode.BLOCK_2D), (Mode.BLOCK_1D, Mode.BLOCK_1D), (Mode.BLOCK_2D, Mode.BLOCK_1D)):
        scales = [new_block_scales(x, mode, *x.shape).uniform_(0.5, 2) for x, mode in ((a, mode_a), (b, mode_b))]
        exact = dequantize(a, scales[0], mode_a), dequantize(b, scales[1], mode_b)
        for held in (scales, [scale.contiguous() for scale in scales]):
            close(kernel.small_gemm(a, b, *held, None, torch.float32, mode_a, mode_b, False, None), *exact)
"""


def test_small_gemm():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SMALL_GEMM], env=environment, cwd=root, capture_output=True, text=True
    )
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this Triton's interpreter cannot loop with numpy 2.4 (3.6 cannot, 3.9 can)")
    assert done.returncode == 0, done.stderr[-2000:]
