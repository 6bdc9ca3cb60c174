"""Launching with little Python: Triton binds and compiles once per kind of arguments, then the compiled kernel is held."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton

# For every kernel: Triton 3.10 turns fusion of multiply and add off by default, and 3.9 warns of that.
_FUSE = {"enable_fp_fusion": True}
_TENSOR, _JIT = torch.Tensor, triton.JITFunction
_NUMBERS = frozenset((int, float, bool, type(None)))
MOST_HELD = 4096  # entries of a cache; sizes are part of its keys, so lengths that always change would fill it without end

_launchers: dict[tuple[Any, ...], Launcher] = {}
_held: dict[tuple[Any, ...], Any] = {}
_hooks = triton.knobs.runtime


@functools.cache
def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def _flatten(args: tuple[Any, ...], key: list[Any]) -> tuple[list[Any], int]:
    """Append numbers and dtypes to `key`; return the arguments with pointers for tensors, and all pointers or-ed."""
    values, pointers = [], 0
    for arg in args:
        kind = arg.__class__
        if kind in _NUMBERS or (kind is tuple and _NUMBERS.issuperset(map(type, arg))):  # such as strides
            values.append(arg)
            key.append(arg)
        elif kind is tuple:
            inner, bits = _flatten(arg, key)
            values.append(tuple(inner))
            pointers |= bits
        else:
            pointer = arg.data_ptr()
            values.append(pointer)
            key.append(arg.dtype)
            pointers |= pointer
    return values, pointers


def _alignments(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        _alignments(arg) if isinstance(arg, tuple) else isinstance(arg, torch.Tensor) and arg.data_ptr() % 16 == 0 for arg in args
    )


class Launcher:
    """One kernel with its constexprs, which come last among its parameters."""

    def __init__(self, kernel: Any, constants: tuple[Any, ...], warps: int, registers: int | None = None) -> None:
        """registers: the most that a thread may take."""
        self.kernel, self.constants, self.options = kernel, constants, {"num_warps": warps, "maxnreg": registers, **_FUSE}

    def __call__(self, grid: tuple[int, int, int], device: int, args: tuple[Any, ...], tail: tuple[Any, ...] = ()) -> None:
        """kernel[grid](*args, *tail, *constants) on the device's current stream.

        tail: arguments whose kind (dtype, alignment, None or not, what Triton specialises numbers on) never changes from one call
        of this Launcher to the next, so nobody looks.
        """
        if device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                return self(grid, device, args, tail)
        key: list[Any] = [self, device]
        if len(args) == 1 and args[0].__class__ is tuple:  # of a source, the most frequent case: without the recursion
            inner, pointers = _flatten(args[0], key)
            values: list[Any] = [tuple(inner)]
        else:
            values, pointers = _flatten(args, key)
        if pointers & 15:
            key.append(_alignments(args))
        held = _held.get(tuple(key))
        if held is None:
            if len(_held) >= MOST_HELD:
                _held.clear()
            _held[tuple(key)] = self.kernel[grid](*args, *tail, *self.constants, **self.options)
            return None
        values += [x.data_ptr() if x.__class__ is _TENSOR else x for x in tail]
        if _hooks.launch_enter_hook.calls or _hooks.launch_exit_hook.calls:  # a profiler listens
            held[grid](*values, *self.constants)
        else:
            stream = torch._C._cuda_getCurrentRawStream(device)
            held.run(*grid, stream, held.function, held.packed_metadata, None, None, None, *values, *self.constants)
        return None


def launch(
    kernel: Any, grid: tuple[int, int, int], device: int, args: tuple[Any, ...], constants: tuple[Any, ...], warps: int
) -> None:
    """Launch through the kernel's Launcher, looked up anew: for kernels whose caller keeps no plan."""
    # jit functions hash themselves by their source, in Python
    key = (id(kernel), warps, *[id(c) if c.__class__ is _JIT else c for c in constants])
    launcher = _launchers.get(key)
    if launcher is None:
        launcher = _launchers[key] = Launcher(kernel, constants, warps)
    launcher(grid, device, args)
