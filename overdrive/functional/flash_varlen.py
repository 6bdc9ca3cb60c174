"""torch's varlen_attn, the FlashAttention-2 kernels for sequences packed end to end: nothing is padded.

The kernels write the rows of the sequences they are told of and leave the others, in the output and in the gradients, as memory
was.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from overdrive.functional.node import applied
from overdrive.functional.packing import Side, alike

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError as error:
    raise ImportError(f"torch {torch.__version__} has no varlen_attn, torch 2.11 has") from error

_OPTIONS = inspect.signature(varlen_attn).parameters
if not {"scale", "window_size"} <= _OPTIONS.keys():
    raise ImportError(f"varlen_attn of torch {torch.__version__} has no scale or no window_size, that of torch 2.11 has")
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _OPTIONS else {}  # torch 2.11 takes groups without being told


class Inside(torch.autograd.Function):
    """x, whose gradient is zero where `inside` is False."""

    @staticmethod
    def forward(ctx: Any, x, inside):
        ctx.save_for_backward(inside)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        (inside,) = ctx.saved_tensors
        return torch.where(inside, dout, 0.0), None


_inside = applied(Inside)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x such that the kernels can load 16 bytes at a time; a compiler, which traces no offsets, has to see to those itself."""
    offset = 0 if torch.compiler.is_compiling() else x.storage_offset()
    if x.stride(2) == 1 and not (x.stride(0) % 8 or x.stride(1) % 8 or offset % 8):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _bounds(side: Side) -> torch.Tensor:
    """i32 [2 B]: where each sequence begins and ends, so that the padding between two is one too."""
    starts = (side.offsets if side.padded is None else side.padded)[:-1]
    return torch.stack([starts, starts + side.offsets.diff()], 1).flatten()


def _rows(side: Side) -> torch.Tensor:
    """bool [N, 1, 1]: whether a token is of a sequence."""
    token = torch.arange(side.tokens, device=side.offsets.device, dtype=torch.int32)
    if side.padded is None:
        return (token < side.offsets[-1])[:, None, None]
    return (torch.searchsorted(_bounds(side), token, right=True) % 2 == 1)[:, None, None]


def flash_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    side_q: Side,
    side_kv: Side,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
) -> torch.Tensor:
    """[N, H, D], [M, G, D], [M, G, D] -> [N, H, D], zeros for tokens of no sequence and for queries that attend to nothing.

    window: how many keys to the left and to the right of its own place a query sees, -1 = all; the last query of each sequence
    stands at its last key. CUDA, fp16 or bf16, D a multiple of 8 up to 256.
    """
    left, right = window
    same = alike(side_q, side_kv)
    query, key, value = (_aligned(x) for x in (query, key, value))
    rows_q = None if side_q.whole else _rows(side_q)
    rows_kv = rows_q if same else None if side_kv.whole else _rows(side_kv)
    if rows_q is not None:
        query = _inside(query, rows_q)
    if rows_kv is not None:
        key, value = _inside(key, rows_kv), _inside(value, rows_kv)
    if any(side.padded is not None and not side.whole for side in (side_q, side_kv)):
        offsets_q = _bounds(side_q)
        offsets_kv = offsets_q if same else _bounds(side_kv)
    else:
        offsets_q, offsets_kv = side_q.offsets.contiguous(), side_kv.offsets.contiguous()
    # told of one query at most, the kernels count on one in every sequence to regroup the heads
    longest_q, longest_kv = max(side_q.longest, 2), side_kv.longest
    if right != 0 and max(window) >= 0 and not same:
        longest_kv = longest_kv + side_q.longest  # windows that long count as endless; they end where a place is before the keys
    out: Any = varlen_attn(
        query, key, value, offsets_q, offsets_kv, longest_q, longest_kv, scale=scale, window_size=(left, right), **_GROUPED
    )
    return out if rows_q is None else torch.where(rows_q, out, 0.0)
