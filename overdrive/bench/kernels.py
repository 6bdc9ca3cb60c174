"""The memory-bound kernels around the GEMMs: how many bytes a second each moves, beside a copy on the device.

Shapes: T tokens, K features. A kernel's bytes are its tensors', each input read once and each output written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from overdrive.bench.formats import MODES, Formats
from overdrive.bench.observe import relative, worst
from overdrive.bench.outcome import Outcome, selected
from overdrive.bench.timing import Protocol, measure, reason, sets_beyond_cache, timed
from overdrive.ops.activation import activation, activation_backward
from overdrive.ops.gemm import dequantize
from overdrive.ops.norm import norm, norm_backward
from overdrive.ops.qkv import qkv_gradient
from overdrive.ops.quantize import Mode, Quantization, quantize
from overdrive.ops.residual import dropout_scale, residual_add, residual_backward, residual_norm
from overdrive.ops.rotary import rotary

BASELINE = "copy"
WITHIN = 0.01
WITHIN_FP8 = 0.04
EPS = 1e-5
CALLS_A_VISIT = 10

Reference = Callable[..., Sequence[Tensor | None]]


class Kernel(NamedTuple):
    """An op and its arguments. reference: its f32 outputs from those arguments, a quantized one as one value; None is not compared.

    at: which output is quantized, as `quantized` says; None: none is.
    """

    name: str
    op: Callable[..., Any]
    arguments: tuple[Any, ...]
    reference: Reference
    quantized: Quantization | None = None
    at: int = 0

    def run(self) -> Any:
        """Its outputs."""
        tail = () if self.quantized is None else self.quantized
        return self.op(*self.arguments, *tail)


def gelu(x: Tensor) -> Tensor:
    """The tanh approximation."""
    return F.gelu(x, approximate="tanh")


def swiglu(x: Tensor) -> Tensor:
    """The first half, activated, times the second."""
    a, b = x.chunk(2, dim=1)
    return F.silu(a) * b


def norm_of(x: Tensor, gamma: Tensor, beta: Tensor | None, rms: bool = False) -> Tensor:
    """LayerNorm or RMSNorm in f32."""
    width, gain = (x.shape[1],), gamma.float()
    if rms:
        return F.rms_norm(x.float(), width, gain, EPS)
    return F.layer_norm(x.float(), width, gain, None if beta is None else beta.float(), EPS)


def gradients(function: Callable[..., Tensor], dy: Tensor, *inputs: Tensor) -> Sequence[Tensor]:
    """Those of a function's inputs, in f32."""
    leaves = [x.detach().float().requires_grad_() for x in inputs]
    with torch.enable_grad():
        return torch.autograd.grad(function(*leaves), leaves, dy.float())


def activation_gradient(function: Callable[..., Tensor], dy: Tensor, x: Tensor, _: Any, __: float, ___: float, bias: bool) -> list:
    """Reference of activation_backward."""
    (dx,) = gradients(function, dy, x)
    return [dx, dx.sum(0) if bias else None]


def turned(x: Tensor, angles: Tensor, back: bool) -> Tensor:
    """Features i and D / 2 + i of x [T, 1, H, D] as complex numbers, turned by angles [T, 1, 1, D]."""
    half = x.shape[-1] // 2
    numbers = torch.complex(x[..., :half].float(), x[..., half:].float())
    angle = -angles[..., :half] if back else angles[..., :half]
    numbers = numbers * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((numbers.real, numbers.imag), -1)


def residual_of(x: Tensor, bias: Tensor, residual: Tensor, p: float, seed: Tensor) -> Tensor:
    """residual + dropout(x + bias), with the kernels' mask."""
    value = x.float() + bias.float()
    return residual.float() + (value * dropout_scale(x.shape[0], x.shape[1], p, seed) if p else value)


class Inputs:
    """One set of inputs: normal values of each width, a gain and a bias."""

    def __init__(self, tokens: int, hidden: int, ffn: int, heads: int, dtype: torch.dtype, device: torch.device) -> None:
        like = {"device": device, "dtype": dtype}
        self.x, self.dy, self.residual = (torch.randn(tokens, hidden, **like) for _ in range(3))
        self.wide, self.dwide = (torch.randn(tokens, ffn, **like) for _ in range(2))
        self.dhalf = self.dwide.flatten()[: tokens * ffn // 2].view(tokens, ffn // 2)
        self.gamma, self.beta, self.bias = (torch.randn(hidden, **like) for _ in range(3))
        self.qkv = [t.view(tokens, 1, heads, hidden // heads) for t in (self.x, self.dy, self.residual)]
        self.angles = torch.rand(tokens, 1, 1, hidden // heads // 2, device=device).repeat(1, 1, 1, 2)
        self.seed = torch.ones(1, dtype=torch.int64, device=device)
        stats = self.x.float()
        self.mean = stats.mean(1)
        self.rstd = (stats.var(1, correction=0) + EPS).rsqrt()
        self.rms_rstd = (stats.square().mean(1) + EPS).rsqrt()


def kernels(i: Inputs, recipes: Sequence[str], formats: Formats) -> Iterator[Kernel]:
    """Every kernel over a set of inputs."""
    hidden, ffn = i.x.shape[1], i.wide.shape[1]
    plain = Quantization(Mode.PLAIN, i.x.dtype)
    modes = {name: formats(mode) for recipe in recipes for name, mode in MODES[recipe].items()}
    yield Kernel(BASELINE, torch.clone, (i.wide,), lambda x: [x.float()])
    for name, q in modes.items():
        yield Kernel(f"quantize {hidden} {name}", quantize, (i.x, False), lambda x, _: [x.float()], q)
        yield Kernel(f"quantize {ffn} {name}", quantize, (i.wide, False), lambda x, _: [x.float()], q)
    for name, q in modes.items():
        row, summed = q._replace(col=False), lambda x, _: [x.float(), x.float().sum(0)]
        yield Kernel(f"quantize {hidden} {name}, rows only", quantize, (i.x, False), lambda x, _: [x.float()], row)
        yield Kernel(f"quantize {hidden} {name} + bias gradient", quantize, (i.x, True), summed, q)
    for name, q in {"plain": plain, **modes}.items():
        for function in (gelu, swiglu):
            value = lambda x, *_, function=function: [function(x.float())]  # noqa: E731
            yield Kernel(f"{function.__name__} {ffn} {name}", activation, (i.wide, function.__name__, 0.0, 0.0), value, q)
        dgelu, dswiglu = partial(activation_gradient, gelu), partial(activation_gradient, swiglu)
        arguments = (i.dwide, i.wide, "gelu", 0.0, 0.0, True)
        yield Kernel(f"gelu backward {ffn} {name} + bias gradient", activation_backward, arguments, dgelu, q)
        arguments = (i.dhalf, i.wide, "swiglu", 0.0, 0.0, False)
        yield Kernel(f"swiglu backward {ffn} {name}", activation_backward, arguments, dswiglu, q)
    for name, q in {"plain": plain, **modes}.items():

        def gathered(dq: Tensor, dk: Tensor, dv: Tensor, _: bool, __: bool) -> list[Tensor]:
            value = torch.stack((dq, dk, dv), 3).flatten(2).flatten(0, 1).float()
            return [value, value.sum(0)]

        yield Kernel(f"qkv gradient {3 * hidden} {name} + bias gradient", qkv_gradient, (*i.qkv, True, True), gathered, q)
    for back in (False, True):
        rotated = lambda q, k, angles, *_, back=back: [turned(x, angles, back) for x in (q, k)]  # noqa: E731
        arguments = (*i.qkv[:2], i.angles, None, None, False, False, back)
        yield Kernel(f"rotary{' backward' if back else ''} {hidden}", rotary, arguments, rotated)
    yield from norms(i, {"plain": plain, **modes})


def norms(i: Inputs, modes: dict[str, Quantization]) -> Iterator[Kernel]:
    """The norms, alone and after a residual, and their backwards."""
    hidden = i.x.shape[1]
    for name, q in modes.items():
        arguments = (i.x, i.gamma, i.beta, EPS, False, False, 0)
        yield Kernel(f"layernorm {hidden} {name}", norm, arguments, lambda x, g, b, *_: [norm_of(x, g, b)], q)
        arguments = (i.x, i.gamma, None, EPS, False, True, 0)
        yield Kernel(f"rmsnorm {hidden} {name}", norm, arguments, lambda x, g, *_: [norm_of(x, g, None, True)], q)

    def layer_norm_gradients(dy, x, gamma, mean, rstd, residual, *_):
        dx, dgamma, dbeta = gradients(norm_of, dy, x, gamma, torch.zeros_like(gamma))
        return [dx if residual is None else dx + residual.float(), dgamma, dbeta]

    def rms_norm_gradients(dy, x, gamma, *_):
        return gradients(lambda x, gamma: norm_of(x, gamma, None, True), dy, x, gamma)

    for residual, suffix in ((None, ""), (i.residual, " + residual")):
        arguments = (i.dy, i.x, i.gamma, i.mean, i.rstd, residual, False, False, 0)
        yield Kernel(f"layernorm backward {hidden}{suffix}", norm_backward, arguments, layer_norm_gradients)
    arguments = (i.dy, i.x, i.gamma, torch.zeros_like(i.mean), i.rms_rstd, None, False, True, 0)
    yield Kernel(f"rmsnorm backward {hidden}", norm_backward, arguments, rms_norm_gradients)

    def dropped(dout, p, seed, _):
        dx = dout.float() * dropout_scale(dout.shape[0], dout.shape[1], p, seed) if p else dout.float()
        return [dx, dx.sum(0)]

    def residual_normed(x, bias, residual, p, seed, gamma, beta, *_):
        out = residual_of(x, bias, residual, p, seed)
        return [out, norm_of(out, gamma, beta)]

    for p in (0.0, 0.1):
        added = (i.x, i.bias, i.residual, p, i.seed)
        yield Kernel(f"residual {hidden} p {p}", residual_add, added, lambda *a: [residual_of(*a)])
        yield Kernel(f"residual backward {hidden} p {p} + bias gradient", residual_backward, (i.dy, p, i.seed, True), dropped)
        for name, q in modes.items():
            arguments = (*added, i.gamma, i.beta, EPS, False, False, 0)
            yield Kernel(f"residual + layernorm {hidden} p {p} {name}", residual_norm, arguments, residual_normed, q, 1)


def outputs_of(kernel: Kernel, outputs: Any) -> list[tuple[Tensor, ...]]:
    """A kernel's outputs as values: of a quantized one those of both its layouts."""
    outputs, q, at = outputs if isinstance(outputs, (tuple, list)) else (outputs,), kernel.quantized, kernel.at
    if q is None:
        return [(output,) for output in outputs]
    data, data_t, scale_inv, scale_inv_t = outputs[at : at + 4]
    if q.mode == Mode.PLAIN:
        values = (data,)
    else:
        values = (dequantize(data, scale_inv, q.mode),) if q.row else ()
        if q.col:
            values += (dequantize(data_t, scale_inv if q.mode.per_tensor else scale_inv_t, q.mode).t(),)
    return [*((output,) for output in outputs[:at]), values, *((output,) for output in outputs[at + 4 :])]


def error(kernel: Kernel) -> tuple[float, float]:
    """(the worst error of its outputs over what rounding allows, the worst error)."""
    found = [
        (relative(value[: want.shape[0]], want), kernel.quantized is not None and kernel.quantized.mode and index == kernel.at)
        for index, (values, want) in enumerate(zip(outputs_of(kernel, kernel.run()), kernel.reference(*kernel.arguments)))
        if want is not None
        for value in values
    ]
    return worst(each / (WITHIN_FP8 if fp8 else WITHIN) for each, fp8 in found), worst(each for each, _ in found)


def tensors(values: Any) -> Iterator[Tensor]:
    """All tensors among the values, however deep."""
    for value in values if isinstance(values, (tuple, list)) else (values,):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors(value)


def bandwidths(
    tokens: int,
    hidden: int,
    ffn: int,
    heads: int,
    dtype: torch.dtype,
    recipes: Sequence[str],
    protocol: Protocol,
    only: Sequence[str] = (),
) -> Outcome:
    """Microseconds, TB/s and share of the copy's bandwidth of every kernel."""
    outcome, device, formats = Outcome(), protocol.device, Formats(protocol.device)
    torch.manual_seed(protocol.seed)
    count = sets_beyond_cache(tokens * hidden * dtype.itemsize, device)
    sets = [list(kernels(Inputs(tokens, hidden, ffn, heads, dtype, device), recipes, formats)) for _ in range(count)]
    names = {BASELINE, *selected((kernel.name for kernel in sets[0]), only)}
    rotated = {each[0].name: each for each in zip(*sets) if each[0].name in names}
    runs, moved, errors = {}, {}, {}
    for number, (name, each) in enumerate(rotated.items()):
        protocol.tick(f"checking: {name}", number, len(rotated))
        try:
            over, errors[name] = error(each[0])
            if not over <= 1:
                raise ArithmeticError(f"the worst error is {errors[name]:.2g}, {over:.2g} times what rounding explains")
            moved[name] = sum(t.numel() * t.element_size() for t in tensors((each[0].arguments, each[0].run())))
            runs[name] = lambda number, each=each: each[number % len(each)].run()
        except Exception as raised:
            outcome.skipped[name] = reason(raised)
    times, failed = measure({name: timed(run, device, CALLS_A_VISIT, alone=True) for name, run in runs.items()}, protocol)
    outcome.skipped |= failed
    found = {name: moved[name] / times[name]["ms"].median / 1e9 for name in times}
    for name, bandwidth in found.items():
        ms = times[name]["ms"]
        copy = bandwidth / found[BASELINE] if BASELINE in found else None
        row = {"variant": name, "us": ms.median * 1e3, "spread_us": ms.width * 1e3, "bytes": moved[name], "TB_s": bandwidth}
        outcome.rows.append({**row, "of_copy": copy, "host_us": times[name]["host_us"].median, "error": errors[name]})
    return outcome
