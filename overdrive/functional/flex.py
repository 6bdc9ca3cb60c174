"""torch's flex_attention, which skips the blocks of scores that a mask hides and takes biases with gradients."""

from __future__ import annotations

import functools
from typing import Any

import torch

from overdrive.functional.attention_mask import MaskFunction, square_causal

MOST_VARIANTS = 256
"""Combinations of dtype, masks, biases, widths and static shapes that one process may compile."""


@functools.cache
def _compiled() -> Any:
    from torch._dynamo import config as dynamo
    from torch.nn.attention.flex_attention import flex_attention  # its import takes a while

    compiled = torch.compile(flex_attention, fullgraph=True)

    def run(*args: Any, **options: Any) -> Any:
        with dynamo.patch(recompile_limit=MOST_VARIANTS, accumulated_recompile_limit=8 * MOST_VARIANTS):
            # its other kernel, for few queries, refuses some masks
            return compiled(*args, **options, kernel_options={"FORCE_USE_FLEX_ATTENTION": True})

    return run


def flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | MaskFunction | None = None,
    causal: bool = False,
    scale: float | None = None,
    bias: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B, H, S, D], [B, G, T, D], [B, G, T, E] -> [B, H, S, E]; mask, causal, bias and offset as in scored_attention.

    A mask may also be a function, the same for every batch element and head; a query that it lets see nothing gives zeros. On CUDA
    it is compiled, and torch refuses a second backward of the same output (retain_graph); elsewhere it is torch's dense form of
    it, forward only.
    """
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    batch, heads, queries, _ = query.shape
    keys, blocks = key.shape[2], None
    if causal:
        mask = square_causal(queries, query.device)
    if isinstance(mask, torch.Tensor):
        lead = (None if mask.shape[0] == 1 else batch, None if mask.shape[1] == 1 else heads)
        allowed = mask.expand(batch, heads, queries, keys)
        blocks = create_block_mask(lambda b, h, i, j: allowed[b, h, i, j], *lead, queries, keys, query.device)
    elif mask is not None:
        blocks = create_block_mask(mask, None, None, queries, keys, query.device)
    added = None if bias is None else bias.expand(batch, heads, queries, keys)
    add_bias = None if added is None else lambda score, b, h, i, j: score + added[b, h, i, j]
    run = _compiled() if query.is_cuda and not torch.compiler.is_compiling() else flex_attention
    aux = None if offset is None else AuxRequest(lse=True)
    result: Any = run(query, key, value, add_bias, blocks, scale, query.shape[1] != key.shape[1], return_aux=aux)
    if offset is None:
        return result
    out, lse = result[0], result[1].lse
    # exp(lse) / (exp(lse) + exp(offset)) of the probability is left beside the one more key
    return (out * torch.sigmoid(lse - offset.view(1, -1, 1)).unsqueeze(-1)).to(query.dtype)
