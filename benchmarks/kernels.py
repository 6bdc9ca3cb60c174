"""Bandwidth of every kernel at [8192, 4096..16384] in bf16 beside a device copy in one run: python benchmarks/kernels.py [filter]

TB/s counts each input read once and each output written once. "host" is the time to launch, with inputs too small to matter.
"""

from __future__ import annotations

import sys
import time

import torch
from triton.testing import do_bench

from overdrive.ops.activation import activation, activation_backward
from overdrive.ops.norm import norm, norm_backward
from overdrive.ops.qkv import qkv_gradient
from overdrive.ops.quantize import Mode, Quantization, quantize
from overdrive.ops.residual import residual_add, residual_backward, residual_norm
from overdrive.ops.rotary import rotary
from overdrive.ops.scaling import arena, begin_step, tenant_id
from overdrive.recipe import DelayedScaling

TOKENS = 8192


def tensors(values):
    """All tensors among the values, however deep."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors(value)


def cases(tokens: int, device: torch.device):
    """(name, op, arguments)."""
    scales, slots = torch.ones(1024, device=device), torch.arange(5, dtype=torch.int32, device=device)
    tenant = tenant_id(DelayedScaling(), None)
    delayed = Quantization(Mode.DELAYED, torch.float8_e4m3fn, scales, slots, 0, tenant, col=True)
    modes = {
        "delayed": delayed,
        "current": Quantization(Mode.CURRENT, torch.float8_e4m3fn, col=True),
        "block 1d": Quantization(Mode.BLOCK_1D, torch.float8_e4m3fn, power_of_2=True, col=True),
        "block 2d": Quantization(Mode.BLOCK_2D, torch.float8_e4m3fn, power_of_2=True, col=True),
    }
    plain = Quantization(Mode.PLAIN, torch.bfloat16)
    x = {k: torch.randn(tokens, k, device=device, dtype=torch.bfloat16) for k in (4096, 8192, 16384)}
    gamma, stats = x[4096][0].clone(), torch.ones(tokens, device=device)
    seed = torch.ones(1, dtype=torch.int64, device=device)
    yield "copy 16384", torch.ops.aten.clone.default, (x[16384],)
    yield "quantize 4096 row only", quantize, (x[4096], False, *delayed._replace(col=False))
    for name, q in modes.items():
        for k in (4096, 16384):
            yield f"quantize {k} {name}", quantize, (x[k], False, *q)
    yield "quantize 4096 delayed + bias", quantize, (x[4096], True, *delayed)
    for name, q in {"plain": plain, **modes}.items():
        yield f"gelu 16384 {name}", activation, (x[16384], "gelu", 0.0, 0.0, *q)
        yield f"swiglu 16384 {name}", activation, (x[16384], "swiglu", 0.0, 0.0, *q)
        yield f"dgelu 16384 {name} + bias", activation_backward, (x[16384], x[16384].clone(), "gelu", 0.0, 0.0, True, *q)
        yield f"dswiglu 16384 {name}", activation_backward, (x[8192], x[16384], "swiglu", 0.0, 0.0, False, *q)
    heads = [x[4096].clone().view(-1, 4, 32, 128) for _ in range(3)]
    for name, q in {"plain": plain, "delayed": delayed}.items():
        yield f"qkv gradient 3 x 4096 {name} + bias", qkv_gradient, (*heads, True, True, *q)
    angles = torch.randn(tokens // 4, 1, 1, 128, device=device)
    query, key, _ = torch.randn(tokens // 4, 4, 48, 128, device=device).bfloat16().split([32, 8, 8], 2)
    for name, interleaved in {"halves": False, "neighbours": True}.items():
        yield f"rotary 32 + 8 heads of 128, {name}", rotary, (query, key, angles, None, None, interleaved, False, False)
    for name, q in {"plain": plain, **modes}.items():
        yield f"layernorm 4096 {name}", norm, (x[4096], gamma, gamma, 1e-5, False, False, 0, *q)
    yield "rmsnorm 4096 plain", norm, (x[4096], gamma, None, 1e-5, False, True, 0, *plain)
    dy, r = x[4096].clone(), x[4096].clone()
    yield "dlayernorm 4096", norm_backward, (dy, x[4096], gamma, stats, stats, None, False, False, 0)
    yield "dlayernorm 4096 + residual", norm_backward, (dy, x[4096], gamma, stats, stats, r, False, False, 0)
    yield "drmsnorm 4096", norm_backward, (dy, x[4096], gamma, stats, stats, None, False, True, 0)
    for p in (0.0, 0.1):
        yield f"residual 4096 p {p}", residual_add, (x[4096], gamma, r, p, seed)
        yield f"dresidual 4096 p {p} + bias", residual_backward, (x[4096], p, seed, True)
        for name, q in {"plain": plain, "delayed": delayed}.items():
            args = (x[4096], gamma, r, p, seed, gamma, gamma, 1e-5, False, False, 0, *q)
            yield f"residual layernorm 4096 p {p} {name}", residual_norm, args
    yield "begin_step", begin_step, (arena(device).counter, 1024, tenant)


def host_time(op, args) -> float:
    """Microseconds to launch."""
    for _ in range(20):
        op(*args)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(100):
        op(*args)
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / 100 * 1e6


def main(wanted: str = "") -> None:
    """Print the table."""
    device = torch.device("cuda", torch.cuda.current_device())
    host = {name: host_time(op, args) for name, op, args in cases(32, device) if wanted in name or name.startswith("copy")}
    print(f"{'kernel':40} {'us':>8} {'TB/s':>6} {'of copy':>8} {'host us':>8}")
    copy = 0.0
    for name, op, args in cases(TOKENS, device):
        if wanted not in name and not name.startswith("copy"):
            continue
        outputs = op(*args)
        moved = sum(t.numel() * t.element_size() for t in tensors((args, outputs)))
        milliseconds = do_bench(lambda op=op, args=args: op(*args), warmup=10, rep=40, return_mode="median")
        bandwidth = moved / milliseconds / 1e9
        copy = copy or bandwidth
        print(f"{name:40} {milliseconds * 1e3:8.1f} {bandwidth:6.2f} {bandwidth / copy:8.0%} {host[name]:8.1f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
