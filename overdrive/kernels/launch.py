"""Launching with little Python: Triton binds and compiles once per kind of arguments, then the compiled kernel is held."""

from __future__ import annotations

from typing import Any

import torch

# For every kernel: Triton 3.10 turns fusion of multiply and add off by default, and 3.9 warns of that.
_FUSE = {"enable_fp_fusion": True}

_held: dict[tuple[Any, ...], Any] = {}


def _kinds(args: tuple[Any, ...], key: list[Any]) -> tuple[Any, ...]:
    """Append to `key` all that Triton specialises on; return the arguments with pointers for tensors."""
    values = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            pointer = arg.data_ptr()
            key.append(arg.dtype)
            key.append(pointer % 16 == 0)
            values.append(pointer)
        elif isinstance(arg, tuple):
            values.append(_kinds(arg, key))
        else:
            values.append(arg)
            if isinstance(arg, int):
                key.append(0 if arg % 16 == 0 else 1 if arg == 1 else 2)
                key.append(-(2**31) <= arg < 2**31)
            else:
                key.append(arg is None)
    return tuple(values)


def launch(
    kernel: Any, grid: tuple[int, int, int], device: int, args: tuple[Any, ...], constants: tuple[Any, ...], warps: int
) -> None:
    """kernel[grid](*args, *constants) on the device's current stream; constants are the kernel's constexprs, which come last."""
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, device, args, constants, warps)
    key: list[Any] = [kernel, device, constants, warps]
    values = _kinds(args, key)
    held = _held.get(tuple(key))
    if held is None:
        _held[tuple(key)] = kernel[grid](*args, *constants, num_warps=warps, **_FUSE)
    else:
        held[grid](*values, *constants)
    return None
