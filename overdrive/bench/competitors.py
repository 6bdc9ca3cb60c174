"""One layer in every way that this machine has: plain PyTorch, compiled, torchao, NVIDIA Transformer Engine, overdrive."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from overdrive.bench.plain import EagerLayer, Spec, share_plain, share_whole
from overdrive.common.recipe import DelayedScaling, Recipe

BASELINE = "eager"
TORCHAO_RECIPES = ("tensorwise", "rowwise")
NVIDIA = "transformer_engine"


class Competitor(NamedTuple):
    """A way to run the layer. build: a module x -> y on the parameters of the eager layer it is given. compiled: by torch."""

    name: str
    build: Callable[[EagerLayer], nn.Module]
    fp8: bool = False
    package: str | None = None
    compiled: bool = False

    @property
    def missing(self) -> bool:
        """Whether its package is not installed."""
        return self.package is not None and importlib.util.find_spec(self.package) is None


class InRecipe(nn.Module):
    """A layer in the autocast of a recipe."""

    def __init__(self, layer: nn.Module, autocast: Callable[..., Any], recipe: Any) -> None:
        super().__init__()
        self.layer, self.autocast, self.recipe = layer, autocast, recipe

    def forward(self, x: Tensor) -> Tensor:
        """What the layer makes of x."""
        with self.autocast(enabled=True, recipe=self.recipe):
            return self.layer(x)


def transformer_layer(engine: Any, spec: Spec, device: torch.device) -> Any:
    """The layer of `engine`: overdrive.pytorch, or transformer_engine.pytorch, whose interface it has."""
    return engine.TransformerLayer(
        spec.hidden,
        spec.ffn,
        spec.heads,
        num_gqa_groups=spec.kv_heads,
        layernorm_epsilon=1e-5,
        hidden_dropout=spec.dropout,
        attention_dropout=spec.dropout,
        self_attn_mask_type="causal" if spec.causal else "no_mask",
        params_dtype=spec.dtype,
        fuse_qkv_params=True,
        qkv_weight_interleaved=spec.kv_heads == spec.heads,
        bias=spec.bias,
        activation=spec.activation,
        normalization=spec.normalization,
        device=device,
    )


def engine_layer(package: str, recipe: Recipe | None, spec: Spec, device: torch.device, eager: EagerLayer) -> nn.Module:
    """overdrive's or Transformer Engine's layer under a recipe of overdrive's, given to each as its own class of that name."""
    engine = importlib.import_module(f"{package}.pytorch")
    layer = transformer_layer(engine, spec, device)
    share_whole(layer, eager)
    if recipe is None:
        return layer
    if package == NVIDIA:
        own = getattr(importlib.import_module(f"{package}.common.recipe"), type(recipe).__name__)
        recipe = own(amax_history_len=recipe.amax_history_len) if isinstance(recipe, DelayedScaling) else own()
    return InRecipe(layer, engine.autocast, recipe)


def compiled_layer(eager: nn.Module) -> nn.Module:
    """torch.compile of the layer."""
    return torch.compile(eager, dynamic=False)  # pyright: ignore[reportReturnType]


def torchao_layer(name: str, spec: Spec, device: torch.device, eager: EagerLayer) -> nn.Module:
    """torch.compile of the eager layer with torchao's FP8 linears in it."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # pyright: ignore[reportMissingImports]

    config = Float8LinearConfig.from_recipe_name(name)
    if device.type == "cpu":
        config = dataclasses.replace(config, emulate=True)
    layer = EagerLayer(spec, device)
    share_plain(layer, eager)
    return compiled_layer(convert_to_float8_training(layer, config=config))


def competitors(spec: Spec, device: torch.device, recipes: Mapping[str, Recipe]) -> list[Competitor]:
    """Everything that may run the layer, the baseline first."""
    engines = [
        Competitor(" ".join(filter(None, (name, of))), partial(engine_layer, package, recipe, spec, device), bool(of), package)
        for name, package in (("TE", NVIDIA), ("overdrive", "overdrive"))
        for of, recipe in {"": None, **recipes}.items()
    ]
    return [
        Competitor(BASELINE, lambda eager: eager),
        Competitor("torch.compile", compiled_layer, compiled=True),
        *(
            Competitor(f"torchao {name}", partial(torchao_layer, name, spec, device), True, "torchao", compiled=True)
            for name in TORCHAO_RECIPES
        ),
        *engines,
    ]
