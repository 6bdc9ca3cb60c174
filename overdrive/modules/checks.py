"""Argument checks that the modules share: each error names the argument, what came, what is allowed and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

NORMALIZATIONS = ("LayerNorm", "RMSNorm")
PARALLEL_MODES = (None, "column", "row")


def refuse(module: str, defaults: dict[str, tuple[Any, Any]], why: str = "parallelism is not built yet") -> None:
    """Raise NotImplementedError for the first argument not at its default; `defaults` maps name to (value, default)."""
    for name, (value, default) in defaults.items():
        if value is not default and value != default:
            raise NotImplementedError(f"{module}: {name}={value!r} is not supported ({why}); leave it at {default!r}")


def refuse_parallelism(module: str, arguments: dict[str, Any]) -> None:
    """Raise NotImplementedError for arguments of parallelism: tp_size must be 1, everything else None or False."""
    size = arguments.pop("tp_size", 1)
    refuse(module, {"tp_size": (size, 1)})
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"{module}: {name}={value!r} is not supported (parallelism is not built yet); leave it out")


def one_of(module: str, name: str, value: Any, allowed: Iterable[Any]) -> Any:
    """`value`, or ValueError listing what is allowed."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{module}: {name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
    return value


def positive_int(module: str, name: str, value: Any) -> int:
    """`value`, or an error unless it is an int above zero."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{module}: {name} must be an int, got {type(value).__name__}: {value!r}")
    if value < 1:
        raise ValueError(f"{module}: {name} must be at least 1, got {value}")
    return value


def epsilon(module: str, value: Any) -> float:
    """`value` as a float, or ValueError unless it is finite and above zero."""
    if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{module}: eps must be a finite number > 0 (it keeps the norm from dividing by zero), got {value!r}")
    return float(value)


def split_sizes(module: str, split: Any, rows: int) -> dict[str, int] | None:
    """parameters_split as name -> rows. A tuple of names splits evenly."""
    if split is None:
        return None
    if not isinstance(split, dict | tuple | list) or not all(isinstance(name, str) for name in split):
        raise TypeError(f"{module}: parameters_split must be a tuple of names, or a dict of name -> rows, got {split!r}")
    if isinstance(split, dict):
        sizes = {name.rstrip("_"): positive_int(module, f"parameters_split[{name!r}]", size) for name, size in split.items()}
    else:
        names = [name.rstrip("_") for name in split]
        if rows % max(len(names), 1):
            raise ValueError(
                f"{module}: parameters_split of {len(names)} names does not divide out_features={rows}; give a dict of sizes"
            )
        sizes = dict.fromkeys(names, rows // max(len(names), 1))
    if len(sizes) != len(split) or sum(sizes.values()) != rows:
        raise ValueError(
            f"{module}: parameters_split must give distinct names and sizes >= 1 that add up to out_features={rows}, got {split!r}"
        )
    return sizes


def default_device(device: torch.device | str | None) -> torch.device:
    """The device asked for, a GPU with its index; None is the current GPU where there is one, else the CPU."""
    asked = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    return torch.device("cuda", torch.cuda.current_device()) if asked.type == "cuda" and asked.index is None else asked


def normal_init(tensor: torch.Tensor) -> None:
    """Weights' default initialisation, N(0, 0.023)."""
    torch.nn.init.normal_(tensor, mean=0.0, std=0.023)


InitMethod = Callable[[torch.Tensor], Any]


def mark_parallel(parameter: torch.Tensor, dim: int) -> None:
    """Attributes by which training frameworks know how a parameter is partitioned."""
    parameter.tensor_model_parallel = True  # pyright: ignore[reportAttributeAccessIssue]
    parameter.partition_dim = dim  # pyright: ignore[reportAttributeAccessIssue]
    parameter.partition_stride = 1  # pyright: ignore[reportAttributeAccessIssue]


def mark_sequence_parallel(parameter: torch.Tensor) -> None:
    """Tell training frameworks that the parameter's gradient is whole on each rank."""
    parameter.sequence_parallel = False  # pyright: ignore[reportAttributeAccessIssue]
