"""The tutorial's layer in five stages on one set of parameters: time, memory, and error against float32."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import overdrive.pytorch as te
from overdrive.bench.competitors import transformer_layer
from overdrive.bench.observe import peak_memory, relative
from overdrive.bench.plain import EagerLayer, Size, Spec, share_plain, share_whole
from overdrive.bench.timing import first_backward
from overdrive.cli import tutorial
from overdrive.cli.layers import FusedLayer, PlainLayer, causal_mask
from overdrive.cli.recipes import RECIPES, RecipeName
from overdrive.scaling.support import usable

# Rounding of a 16-bit layer stays below a hundredth; parameters that are not shared differ by about one.
SHARED_WITHIN = 0.05
# What `measure` does for a stage: error, memory, time.
PARTS = 3


@dataclass(frozen=True)
class Settings:
    """One run of the quickstart."""

    size: Size
    dtype: torch.dtype
    device: torch.device
    recipes: tuple[RecipeName, ...]
    dropout: float
    causal: bool
    iterations: int
    warmup: int
    seed: int


@dataclass(frozen=True)
class Stage:
    """One way to run the layer. `share` hands it the plain layer's parameters."""

    name: str
    build: Callable[[float], nn.Module]
    share: Callable[[nn.Module, nn.Module], None]
    recipe: RecipeName | None = None


@dataclass(frozen=True)
class Result:
    """What one stage showed; `reason` alone where it cannot run here."""

    name: str
    milliseconds: float = float("nan")
    peak_bytes: int = 0
    output_error: float = float("nan")
    gradient_error: float = float("nan")
    reason: str = ""


class NotSharedError(RuntimeError):
    """A stage does not compute with the plain layer's parameters."""


def stages(settings: Settings) -> list[Stage]:
    """The stages in the tutorial's order, and plain PyTorch with fused attention beside the plain layer."""
    size, device = settings.size, settings.device
    own = partial(PlainLayer, size, linear=te.Linear, layer_norm=te.LayerNorm)

    def spec(dropout: float) -> Spec:
        return Spec(**dataclasses.asdict(size), causal=settings.causal, dropout=dropout, dtype=settings.dtype)

    def whole(dropout: float) -> te.TransformerLayer:
        return transformer_layer(te, spec(dropout), device)

    return [
        Stage("PyTorch", partial(PlainLayer, size), share_plain),
        Stage("PyTorch + SDPA", lambda dropout: EagerLayer(spec(dropout), device), share_plain),
        Stage("Linear + LayerNorm", own, tutorial.share_parameters_with_basic_te_model),
        Stage("LayerNormLinear/MLP", partial(FusedLayer, size), tutorial.share_parameters_with_fused_te_model),
        Stage("TransformerLayer", whole, share_whole),
        *(Stage(f"FP8 {r.value}", whole, share_whole, r) for r in settings.recipes),
    ]


class Bench:
    """The plain layer, its float32 copy, the input, and the output's gradient that every stage meets."""

    def __init__(self, settings: Settings) -> None:
        self.settings, size = settings, settings.size
        self.like = {"device": settings.device, "dtype": settings.dtype}
        torch.manual_seed(settings.seed)
        with settings.device:
            self.plain = PlainLayer(size, dropout=0.0).to(**self.like)
        shape = (size.sequence, size.batch, size.hidden)
        self.x = torch.randn(shape, **self.like).requires_grad_()
        self.dy = torch.randn(shape, **self.like)
        self.mask = causal_mask(size, settings.device) if settings.causal else None
        self.draw_parameters(settings.seed)
        self.exact = self.measure_exact()

    def make(self, stage: Stage, dropout: float) -> nn.Module:
        """The stage's module, on the plain layer's parameters."""
        with self.settings.device:  # plain PyTorch would initialise on the CPU
            module = stage.build(dropout).to(**self.like)
        stage.share(module, self.plain)
        return module

    def draw_parameters(self, seed: int) -> None:
        """Write new values into the plain layer's parameters in place."""
        generator = torch.Generator(self.settings.device).manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.plain.named_parameters():
                gamma = name in ("ln1.weight", "ln2.weight")
                parameter.normal_(1.0 if gamma else 0.0, 0.02, generator=generator)

    def measure_exact(self) -> tuple[Tensor, Tensor]:
        """Output and gradients of the plain layer in float32, on the same parameters and inputs."""
        exact = copy.deepcopy(self.plain).float()
        x = self.x.detach().float().requires_grad_()
        y = exact(x, self.mask)
        with first_backward():
            y.backward(self.dy.float())
        return y.detach(), joined(x, exact)

    def step(self, stage: Stage, module: nn.Module) -> Tensor:
        """One forward and backward; gradients add up where the parameters are."""
        # Layers with fused attention know their mask by name; the others take it as a tensor.
        mask = () if isinstance(module, te.TransformerLayer | EagerLayer) else (self.mask,)
        with precision(stage.recipe):
            y = module(self.x, *mask)
        y.backward(self.dy)
        return y

    def errors(self, stage: Stage) -> tuple[float, float]:
        """Relative errors of output and gradients, each as one vector, in the Frobenius norm."""
        # The values are written after the sharing, so a stage that holds a copy is far off.
        self.draw_parameters(self.settings.seed + 1)
        module = self.make(stage, dropout=0.0)
        self.draw_parameters(self.settings.seed)
        y = self.x
        for _ in range(3):  # delayed scaling has no scales before its first step
            self.clear()
            y = self.step(stage, module)
        y_exact, gradients_exact = self.exact
        output_error = relative(y.detach(), y_exact)
        if stage.recipe is None and not output_error < SHARED_WITHIN:
            raise NotSharedError(
                f"{stage.name}: the output is {output_error:.2g} away from the plain layer's, more than {SHARED_WITHIN}; "
                "the stage does not use its parameters"
            )
        return output_error, relative(joined(self.x, self.plain), gradients_exact)

    def clear(self) -> None:
        """Forget all gradients."""
        self.x.grad = None
        self.plain.zero_grad(set_to_none=True)


def precision(recipe: RecipeName | None) -> contextlib.AbstractContextManager[None]:
    """The autocast region of a recipe; None computes in the parameters' own precision."""
    return te.autocast(enabled=False) if recipe is None else te.autocast(enabled=True, recipe=RECIPES[recipe])


def joined(x: Tensor, module: nn.Module) -> Tensor:
    """The gradients of the input and of all parameters as one vector."""
    gradients = [x.grad, *(p.grad for p in module.parameters())]
    return torch.cat([g.float().flatten() for g in gradients if g is not None])


def measure(bench: Bench, stage: Stage, tick: Callable[[str], None]) -> Result:
    """Check one stage against the reference, then take its memory and its time."""
    settings = bench.settings
    if stage.recipe is not None:
        able, reason = usable(RECIPES[stage.recipe])
        if not able:
            for _ in range(PARTS):
                tick("not usable here")
            return Result(stage.name, reason=reason)
    tick("error")
    output_error, gradient_error = bench.errors(stage)
    tick("memory")
    module = bench.make(stage, settings.dropout)

    def step() -> None:
        bench.step(stage, module)

    step()
    peak = peak_memory(step, settings.device)
    tick("time")
    milliseconds = tutorial.mean_time(step, settings.device, settings.iterations, settings.warmup)
    bench.clear()
    return Result(stage.name, milliseconds, peak, output_error, gradient_error)


def run(settings: Settings, tick: Callable[[str], None] = lambda _: None) -> list[Result]:
    """All stages in order; `tick` hears what is measured next, PARTS times a stage."""
    bench = Bench(settings)
    return [measure(bench, stage, lambda what, name=stage.name: tick(f"{name}: {what}")) for stage in stages(settings)]
