"""What a query may attend to: Transformer Engine's mask names, and the boolean mask that they and the caller's tensor make.

Shapes: B batch, H heads, S queries, T keys. In a caller's mask True = masked out; in a score mask True = attend, as torch has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from overdrive.functional.packing import Packing

Mask = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None
MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(batch, head, query, key), all i64 [] -> bool []: whether the query attends to the key."""


class MaskKind(NamedTuple):
    """padding, arbitrary: the caller's tensor counts. causal: no key after its query. left, right: no key further than that before
    or after its query, -1 = however far. Query i stands beside key i or (bottom_right) the last query beside the last key; with
    padding the last ones are the last that are no padding.
    """

    padding: bool = False
    causal: bool = False
    bottom_right: bool = True
    arbitrary: bool = False
    left: int = -1
    right: int = -1

    @property
    def takes_mask(self) -> bool:
        """Whether the caller's mask tensor is read."""
        return self.padding or self.arbitrary

    @property
    def window(self) -> tuple[int, int]:
        """left and right, as causal leaves them."""
        return self.left, 0 if self.causal else self.right


MASK_KINDS = {
    "no_mask": MaskKind(),
    "padding": MaskKind(padding=True),
    "causal": MaskKind(causal=True, bottom_right=False),
    "padding_causal": MaskKind(padding=True, causal=True, bottom_right=False),
    "padding,causal": MaskKind(padding=True, causal=True, bottom_right=False),
    "causal,padding": MaskKind(padding=True, causal=True, bottom_right=False),
    "causal_bottom_right": MaskKind(causal=True),
    "padding_causal_bottom_right": MaskKind(padding=True, causal=True),
    "arbitrary": MaskKind(arbitrary=True),
}


def fits(tensor: torch.Tensor, allowed: Sequence[tuple[int, ...]]) -> bool:
    """Whether each dimension has a size that is allowed for it. A compiler knows == of sizes that it traces, and not `in`."""
    if tensor.dim() != len(allowed):
        return False
    for size, sizes in zip(tensor.shape, allowed):
        for one in sizes:
            if size == one:
                break
        else:
            return False
    return True


def check_mask(kind: MaskKind, mask: Mask, batch: int, heads: int, queries: int, keys: int) -> None:
    """Raise TypeError or ValueError, saying what is allowed, unless `mask` fits `kind`."""
    pair = mask if isinstance(mask, tuple) else (mask, mask)
    if mask is None or len(pair) != 2 or (kind.arbitrary and isinstance(mask, tuple)):
        want = "a bool tensor" if kind.arbitrary else "a bool tensor (or a pair of them, for queries and for keys)"
        raise ValueError(f"attention_mask must be {want} with padding and arbitrary masks, got {mask!r}; True = masked out")
    for part, length in zip(pair, (queries, keys)):
        if not isinstance(part, torch.Tensor):
            raise TypeError(f"attention_mask must be bool tensors (True = masked out), got {type(part).__name__}")
        if part.dtype != torch.bool:
            raise TypeError(f"attention_mask must be bool (True = masked out), got {part.dtype}; convert it, e.g. mask.bool()")
        allowed = ((batch,), (1,), (1,), (length,)) if kind.padding else ((batch, 1), (heads, 1), (queries, 1), (keys,))
        if not fits(part, allowed):
            shape = "[batch, 1, 1, sequence]" if kind.padding else "[batch or 1, heads or 1, queries or 1, keys]"
            pair_hint = (
                "" if kind.arbitrary or isinstance(mask, tuple) or queries == keys else "; give a pair, for queries and keys"
            )
            raise ValueError(
                f"attention_mask must be {shape} with batch {batch}, heads {heads}, {queries} queries and {keys} keys, "
                f"got {list(part.shape)}{pair_hint}"
            )


def square_causal(length: int, device: torch.device) -> torch.Tensor:
    """The score mask bool [1, 1, S, S] that `causal` stands for."""
    return torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()


def diagonal(kind: MaskKind, mask: Mask, queries: int, keys: int) -> int | torch.Tensor:
    """How many keys to the right of its own index a query stands; with padding int64 [B, 1, 1, 1]."""
    if not kind.bottom_right:
        return 0
    if not kind.padding:
        return keys - queries
    if not isinstance(mask, tuple):  # as many queries as keys in each sequence
        return 0
    lengths = [part.logical_not().sum(-1, keepdim=True) for part in mask]
    return lengths[1] - lengths[0]


def places(kind: MaskKind, mask: Mask, queries: int, keys: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Where queries stand, [B or 1, 1, S, 1], and keys, [T], on one axis."""
    rows = torch.arange(queries, device=device)[None, None, :, None] + diagonal(kind, mask, queries, keys)
    return rows, torch.arange(keys, device=device)


def score_mask(
    kind: MaskKind, mask: Mask, queries: int, keys: int, device: torch.device
) -> tuple[torch.Tensor | None, bool, torch.Tensor | None]:
    """(score mask that broadcasts to [B, H, S, T] or None, causal, dead).

    causal: the kernel's own square causal mask says it all. dead [B or 1, H or 1, S or 1, 1]: True where a query is padding or may
    attend to nothing. Such a row attends to everything in the score mask, so that no softmax is empty; its output is to be zeroed.
    """
    windowed = kind.left >= 0 or kind.right >= 0
    if not kind.takes_mask and not windowed and (not kind.causal or queries == keys):
        return None, kind.causal, None
    padded, hidden = mask if isinstance(mask, tuple) else (mask, mask)
    if not kind.takes_mask:
        hidden = None
    if kind.causal or windowed:
        rows, columns = places(kind, mask, queries, keys, device)
        right = 0 if kind.causal else kind.right
        for beyond in (columns > rows + right if right >= 0 else None, columns < rows - kind.left if kind.left >= 0 else None):
            if beyond is not None:
                hidden = beyond if hidden is None else hidden | beyond
    assert hidden is not None
    dead = hidden.all(-1, keepdim=True)
    allowed = ~hidden | dead
    if kind.padding:
        assert padded is not None
        dead = dead | padded.transpose(2, 3)
    return allowed, False, dead


def document_mask(kind: MaskKind, packing_q: Packing, packing_kv: Packing) -> MaskFunction:
    """What score_mask says of the padded sequences, of packed tokens as they lie; those of no sequence attend to nothing."""
    queries, keys = packing_q.padded.shape[-1], packing_kv.padded.shape[-1]
    document, row = packing_q.inverse // queries, packing_q.inverse % queries  # no sequence: document -1
    key_document, column = packing_kv.inverse // keys, packing_kv.inverse % keys
    shift = diagonal(kind, (packing_q.padded, packing_kv.padded), queries, keys)
    if isinstance(shift, torch.Tensor):
        row = row + shift.flatten()[document]
    left, right = kind.window

    def allowed(batch, head, i, j):
        seen = (document[i] == key_document[j]) & (document[i] >= 0)
        if right >= 0:
            seen = seen & (column[j] <= row[i] + right)
        return seen & (column[j] >= row[i] - left) if left >= 0 else seen

    return allowed
