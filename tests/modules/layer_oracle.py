"""Linear, the norms and the MLP in plain PyTorch and float64, and one forward and backward of a module beside them.

A formula maps (input, parameters by name), all float64, to the tuple of what the module returns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import overdrive.pytorch as te
from tests.numerics import RECIPES, TOLERANCES, assert_close, assert_same_bits

IN, OUT, FFN, TOKENS = 48, 32, 64, (2, 16)
Named = dict[str, torch.Tensor]
Formula = Callable[[torch.Tensor, Named], tuple[torch.Tensor, ...]]


def gelu(x):
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + torch.exp(-x))


def qgelu(x):
    return x / (1 + torch.exp(-1.702 * x))


def srelu(x):
    return x.clamp(min=0) ** 2


def gated(function):
    def gate(x):
        activated, linear = x.tensor_split(2, -1)
        return function(activated) * linear

    return gate


def clamped_swiglu(limit=7.0, alpha=1.702):
    def gate(x):
        g, u = x.tensor_split(2, -1)
        g, u = g.clamp(max=limit), u.clamp(-limit, limit) + 1
        return g / (1 + torch.exp(-alpha * g)) * u

    return gate


ACTIVATIONS = {
    "gelu": gelu,
    "geglu": gated(gelu),
    "qgelu": qgelu,
    "qgeglu": gated(qgelu),
    "relu": torch.relu,
    "reglu": gated(torch.relu),
    "srelu": srelu,
    "sreglu": gated(srelu),
    "silu": silu,
    "swiglu": gated(silu),
    "glu": gated(torch.sigmoid),
    "clamped_swiglu": clamped_swiglu(),
}


def linear(x: torch.Tensor, p: Named, prefix: str = "", bias: bool = True) -> torch.Tensor:
    """x W^T + b; split weights lie one below the other, in the order of the parameters."""
    mine = {name: value for name, value in p.items() if name.startswith(prefix) and not name.startswith("layer_norm_")}
    y = x @ torch.cat([value for name, value in mine.items() if name.endswith("weight")]).t()
    biases = [value for name, value in mine.items() if name.endswith("bias")]
    return y + torch.cat(biases) if bias and biases else y


def norm(x, gamma, beta=None, rms=False, zero_centered=False, eps=1e-5):
    """LayerNorm, or RMSNorm."""
    x = x if rms else x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (gamma + 1 if zero_centered else gamma)
    return y if beta is None else y + beta


def formula_of(module: torch.nn.Module, activation: Callable[..., Any] | None = None) -> Formula:
    """What a te.Linear, LayerNormLinear or LayerNormMLP built with its arguments has to return."""
    m: Any = module
    last = "fc2_" if isinstance(module, te.LayerNormMLP) else ""

    def formula(x, p):
        if not isinstance(module, te.Linear):
            rms = m.normalization == "RMSNorm"
            x = norm(x, p["layer_norm_weight"], p.get("layer_norm_bias"), rms, m.zero_centered_gamma, m.eps)
        normed = x
        if last:
            x = (activation or ACTIVATIONS[m.activation])(linear(x, p, "fc1_"))
        outputs = [linear(x, p, last, bias=not m.return_bias)]
        if m.return_bias:
            outputs.append(torch.cat([b for name, b in p.items() if name.endswith("bias") and name.startswith(last)
                                      and not name.startswith("layer_norm_")]))  # fmt: skip
        if getattr(m, "return_layernorm_output", False):
            outputs.append(normed)
        return tuple(outputs)

    return formula


def build(layer: str, device: str, dtype: torch.dtype = torch.float32, /, **arguments: Any) -> Any:
    """A te.Linear or LayerNormLinear [IN -> OUT], or LayerNormMLP [IN, FFN], no parameter of it trivial."""
    sizes = {"Linear": (IN, OUT), "LayerNormLinear": (IN, OUT), "LayerNormMLP": (IN, FFN)}[layer]
    module = getattr(te, layer)(*sizes, params_dtype=dtype, device=device, **arguments)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_((torch.randn(parameter.shape) * 0.2).to(parameter))
    return module


def features(*lead: int, dtype: torch.dtype = torch.float32, device: str = "cpu", size: int = IN) -> torch.Tensor:
    """An input [*lead, size] with a mean and a spread of its own, requiring grad."""
    return (torch.randn(*lead, size) * 1.5 + 0.5).to(device, dtype).requires_grad_()


def tuple_of(outputs: Any) -> tuple[torch.Tensor, ...]:
    """Outputs as a tuple, a nested (result, residual) flattened."""
    if isinstance(outputs, torch.Tensor):
        return (outputs,)
    return tuple(tensor for output in outputs if output is not None for tensor in tuple_of(output))


def fp8(recipe: str) -> contextlib.AbstractContextManager[Any]:
    """The autocast of a recipe of the tolerance table."""
    return contextlib.nullcontext() if RECIPES[recipe] is None else te.autocast(recipe=RECIPES[recipe])


class Step(NamedTuple):
    """Outputs and gradients ("input" and the parameters by name) of one forward and backward."""

    outputs: tuple[torch.Tensor, ...]
    grads: dict[str, torch.Tensor | None]


def gradients_like(outputs: tuple[torch.Tensor, ...], seed: int = 0) -> list[torch.Tensor]:
    """Normal gradients, the same for equal shapes whatever the device."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(output.shape, generator=generator).to(output) for output in outputs]


def step(module: Any, x: torch.Tensor, recipe: str = "plain", call: Callable[..., Any] | None = None, **arguments: Any) -> Step:
    """One forward and backward from cleared gradients; call replaces module(x, **arguments)."""
    module.zero_grad()
    x.grad = None
    with fp8(recipe):
        outputs = tuple_of((module if call is None else call)(x, **arguments))
    pairs = [pair for pair in zip(outputs, gradients_like(outputs)) if pair[0].requires_grad]
    torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs])
    grads = {"input": x.grad, **{name: parameter.grad for name, parameter in module.named_parameters()}}
    return Step(outputs, {name: grad if grad is None else grad.clone() for name, grad in grads.items()})


def check(
    module: Any,
    x: torch.Tensor,
    recipe: str = "plain",
    formula: Formula | None = None,
    call: Callable[..., Any] | None = None,
    dtype: torch.dtype | None = None,
    kinks: bool = False,
) -> Step:
    """A step (delayed scaling: the second, with the scales of the first) whose outputs and gradients are those of the formula.

    dtype: what is computed in, if not x's. The MLP's outputs are two linears deep, its gradients four; the norm costs one more.
    kinks: the activation has some; an error e puts a share e of values on the wrong side, which costs the gradients sqrt(e).
    Fewer than 16 different tokens average little: twice the depth.
    """
    for _ in range(2 if recipe == "delayed" else 1):
        result = step(module, x, recipe, call)
    x64 = x.detach().cpu().double().requires_grad_(x.requires_grad)
    p64 = {name: p.detach().cpu().double().requires_grad_(p.requires_grad) for name, p in module.named_parameters()}
    expected = (formula or formula_of(module))(x64, p64)
    assert len(result.outputs) == len(expected)
    depth = {te.Linear: 1, te.LayerNormLinear: 2, te.LayerNormMLP: 3}.get(type(module), 1)
    if x.shape[:-1].numel() < 16 or x.stride(0) == 0:
        depth *= 2
    dtype = dtype or x.dtype
    for index, (output, want) in enumerate(zip(result.outputs, expected)):
        assert output.dtype == dtype, f"output {index} is {output.dtype}"
        assert_close(output, want.detach(), dtype, recipe, f"output {index}", depth)
    douts = [grad.cpu().double() for grad in gradients_like(result.outputs)]
    torch.autograd.backward(expected, douts)
    for name, leaf in (("input", x64), *p64.items()):
        grad = result.grads[name]
        if not leaf.requires_grad:
            assert grad is None, f"gradient of {name}, which is frozen"
            continue
        assert grad is not None, f"no gradient of {name}"
        want = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        beyond = 2 / TOLERANCES[dtype, recipe] if kinks else 0
        assert_close(grad, want, dtype, recipe, f"gradient of {name}", 2 * depth - 1 + beyond)
    return result


def assert_same_step(actual: Step, expected: Step) -> None:
    """Fail unless outputs and gradients agree bit for bit."""
    assert len(actual.outputs) == len(expected.outputs)
    for index, (a, e) in enumerate(zip(actual.outputs, expected.outputs)):
        assert_same_bits(a, e, f"output {index}")
    assert actual.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        if grad is None:
            assert actual.grads[name] is None, name
        else:
            assert_same_bits(actual.grads[name], grad, f"gradient of {name}")
