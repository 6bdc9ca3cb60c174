"""The tutorial's layer, forward and backward: plain PyTorch with SDPA against overdrive, in one run on one GPU.

    python benchmarks/layer.py [--batch 4 --iterations 30 --json out.json]

Everything is checked against the plain layer in float32 before it is timed. Medians over rounds that visit the variants
in random order: the GPU is limited by its power, so a variant is slower after a hungry one.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import random
import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
from torch import nn

import overdrive.pytorch as te
from overdrive.common.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling


class Eager(nn.Module):
    """The layer as one writes it in PyTorch. x [S, B, H]."""

    def __init__(self, hidden: int, ffn: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.ln1, self.ln2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.fc1, self.fc2 = nn.Linear(hidden, ffn), nn.Linear(ffn, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.ln1(x)).unflatten(-1, (self.heads, -1)).chunk(3, -1)
        q, k, v = (t.permute(1, 2, 0, 3) for t in qkv)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout)
        x = x + F.dropout(self.proj(attention.permute(2, 0, 1, 3).flatten(2)), self.dropout)
        return x + F.dropout(self.fc2(F.gelu(self.fc1(self.ln2(x)), approximate="tanh")), self.dropout)


def share(layer: te.TransformerLayer, eager: Eager) -> None:
    """Give the layer the plain one's parameters."""
    attention, mlp = layer.self_attention, layer.layernorm_mlp
    pairs = {
        (attention.layernorm_qkv, "layer_norm_weight"): eager.ln1.weight,
        (attention.layernorm_qkv, "layer_norm_bias"): eager.ln1.bias,
        (attention.layernorm_qkv, "weight"): eager.qkv.weight,
        (attention.layernorm_qkv, "bias"): eager.qkv.bias,
        (attention.proj, "weight"): eager.proj.weight,
        (attention.proj, "bias"): eager.proj.bias,
        (mlp, "layer_norm_weight"): eager.ln2.weight,
        (mlp, "layer_norm_bias"): eager.ln2.bias,
        (mlp, "fc1_weight"): eager.fc1.weight,
        (mlp, "fc1_bias"): eager.fc1.bias,
        (mlp, "fc2_weight"): eager.fc2.weight,
        (mlp, "fc2_bias"): eager.fc2.bias,
    }
    for (module, name), parameter in pairs.items():
        setattr(module, name, parameter)


def step(
    run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, dy: torch.Tensor, parameters: list[nn.Parameter]
) -> torch.Tensor:
    x.grad = None
    for parameter in parameters:
        parameter.grad = None
    y = run(x)
    y.backward(dy)
    return y


def peak_memory(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, dy: torch.Tensor) -> float:
    """GiB that the allocator holds at most during forward and backward, above parameters, their gradients and the input."""
    run(x).backward(dy)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(x).backward(dy)
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("hidden", 4096), ("ffn", 16384), ("heads", 32), ("sequence", 2048), ("batch", 4), ("iterations", 30)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--json")
    a = parser.parse_args()
    torch.manual_seed(0)
    dtype, device = getattr(torch, a.dtype), torch.device("cuda")
    eager = Eager(a.hidden, a.ffn, a.heads, a.dropout).to(device, dtype)
    layer = te.TransformerLayer(
        a.hidden, a.ffn, a.heads, hidden_dropout=a.dropout, attention_dropout=a.dropout, fuse_qkv_params=True, params_dtype=dtype
    )
    share(layer, eager)
    inputs = [torch.randn(a.sequence, a.batch, a.hidden, device=device, dtype=dtype, requires_grad=True) for _ in range(2)]
    dy = torch.randn_like(inputs[0])
    parameters = list(eager.parameters())
    recipes = {"delayed": DelayedScaling(), "current": Float8CurrentScaling(), "block": Float8BlockScaling()}

    def overdrive(recipe) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x: torch.Tensor) -> torch.Tensor:
            with te.autocast(recipe=recipe) if recipe else contextlib.nullcontext():
                return layer(x)

        return run

    variants: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"eager": eager, "overdrive": overdrive(None)}
    variants |= {f"overdrive {name}": overdrive(recipe) for name, recipe in recipes.items()}

    # Correct first: against the plain layer in float32.
    errors = {}
    if a.dropout == 0:
        exact = Eager(a.hidden, a.ffn, a.heads, 0.0).to(device)
        exact.load_state_dict({k: v.float() for k, v in eager.state_dict().items()})
        x32 = inputs[0].detach().float().requires_grad_()
        y32 = step(exact, x32, dy.float(), list(exact.parameters()))
        for name, run in variants.items():
            for _ in range(2):
                y = step(run, inputs[0], dy, parameters)
            gradients = [(x32.grad, inputs[0].grad), *((p.grad, q.grad) for p, q in zip(exact.parameters(), parameters))]
            relative = [float(((q.float() - p).norm() / p.norm()).detach()) for p, q in ((y32, y), *gradients)]
            errors[name] = (relative[0], max(relative[1:]))
            assert errors[name][1] < (0.2 if " " in name else 0.05), (name, relative)
        del exact, x32, y32

    times: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(a.iterations + 5):
        for name in random.sample(list(variants), len(variants)):
            run = variants[name]
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            step(run, inputs[round_ % 2], dy, parameters)
            start.record()
            for repeat in range(3):
                step(run, inputs[repeat % 2], dy, parameters)
            end.record()
            torch.cuda.synchronize()
            if round_ >= 5:
                times[name].append(start.elapsed_time(end) / 3)
    base = statistics.median(times["eager"])
    rows = []
    for name, run in variants.items():
        quartiles = statistics.quantiles(times[name], n=4)
        row = {
            "variant": name,
            "ms": quartiles[1],
            "spread_ms": quartiles[2] - quartiles[0],
            "ratio": quartiles[1] / base,
            "peak_GiB": peak_memory(run, inputs[0], dy),
            "error_output": errors.get(name, (None, None))[0],
            "error_gradients": errors.get(name, (None, None))[1],
        }
        rows.append(row)
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if a.json:
        about = {
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.date.today().isoformat(),
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cudnn": torch.backends.cudnn.version(),
            "overdrive": te.__version__,
            "arguments": {name: value for name, value in vars(a).items() if name != "json"},
        }
        with open(a.json, "w") as file:
            json.dump({**about, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
