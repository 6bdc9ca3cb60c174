"""Where sequences begin and end: packed end to end (format thd) to a padded batch and back, and the padding masks of a batch.

Shapes: B sequences, L the longest, N packed tokens. Errors name the arguments as DotProductAttention.forward has them.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from overdrive.functional.node import applied
from overdrive.ops.library import capturing

_seen: Any = WeakIdKeyDictionary()
"""Offsets that were checked: (version, values). All layers share theirs, so the host waits for the GPU once."""


class Lengths(NamedTuple):
    """The arguments by which a caller says how long sequences are, as DotProductAttention.forward takes them."""

    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_kv: torch.Tensor | None = None
    cu_seqlens_q_padded: torch.Tensor | None = None
    cu_seqlens_kv_padded: torch.Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_kv: int | None = None
    pad_between_seqs: bool | None = None


NOTHING_SAID = Lengths()


class Packing(NamedTuple):
    """places [B * L]: the packed token at each place of the padded batch; inverse [N]: the place of each token; -1 = none.

    padded bool [B, 1, 1, L]: True where there is no token.
    """

    places: torch.Tensor
    inverse: torch.Tensor
    padded: torch.Tensor

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """[N, ...] -> [B, L, ...], zeros where there is no token."""
        rows = _take_rows(x, self.places, self.inverse)
        return rows.view(self.padded.shape[0], self.padded.shape[-1], *x.shape[1:])

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, ...] -> [N, ...], zeros for tokens of no sequence."""
        return _take_rows(x.flatten(0, 1), self.inverse, self.places)


class TakeRows(torch.autograd.Function):
    """x[index], zeros where index is -1. inverse undoes index, so the gradient takes rows too, instead of adding them up."""

    @staticmethod
    def forward(ctx: Any, x, index, inverse):
        ctx.save_for_backward(index, inverse)
        shape = (-1, *(1 for _ in x.shape[1:]))
        if x.shape[0] == 0:
            return x.new_zeros(index.shape[0], *x.shape[1:])
        return torch.where((index < 0).view(shape), 0, x.index_select(0, index.clamp(min=0)))

    @staticmethod
    def backward(ctx: Any, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        index, inverse = ctx.saved_tensors
        return _take_rows(dout, inverse, index), None, None


_take_rows = applied(TakeRows)


def packing(offsets: torch.Tensor, padded: torch.Tensor | None, longest: int, tokens: int) -> Packing:
    """The Packing of `tokens` tokens whose sequences begin at padded[:-1] (offsets[:-1] if None), lengths the steps of offsets."""
    starts, lengths = (offsets if padded is None else padded)[:-1].long(), offsets.diff().long()
    place = torch.arange(longest, device=offsets.device)
    outside = place >= lengths[:, None]
    index = torch.where(outside, -1, starts[:, None] + place).flatten()
    token = torch.arange(tokens, device=offsets.device)
    row = torch.searchsorted(starts, token, right=True) - 1
    place = token - starts[row]
    return Packing(index, torch.where(place < lengths[row], row * longest + place, -1), outside[:, None, None])


def _values(name: str, offsets: torch.Tensor) -> list[int]:
    """What `offsets` are, ValueError unless they start at 0 and never fall. The host waits for them once."""
    version = None if offsets.is_inference() else offsets._version
    known = _seen.get(offsets)
    if version is not None and known is not None and known[0] == version:
        return known[1]
    values = offsets.tolist()
    if values[0] != 0 or values != sorted(values):
        raise ValueError(f"{name} must start at 0 and never fall (monotonic), as sequences lie one after another; got {values}")
    if version is not None:
        _seen[offsets] = (version, values)
    return values


def _steps(values: list[int]) -> list[int]:
    return [end - start for start, end in itertools.pairwise(values)]


def _unreadable(offsets: torch.Tensor) -> bool:
    """Whether a compiler traces or a graph captures, for which values on a device do not exist yet."""
    return torch.compiler.is_compiling() or capturing(offsets.device)


def _check_form(name: str, offsets: Any, batch: int | None, device: torch.device) -> None:
    """TypeError or ValueError unless `offsets`, argument `name`, is int32 [B + 1] on `device`, not looking at its values."""
    if not isinstance(offsets, torch.Tensor) or offsets.dtype != torch.int32:
        came = offsets.dtype if isinstance(offsets, torch.Tensor) else type(offsets).__name__
        raise TypeError(f"{name} must be an int32 tensor [batch + 1] of where sequences begin and end, got {came}")
    if offsets.dim() != 1 or offsets.shape[0] < 2 or (batch is not None and batch != offsets.shape[0] - 1):
        want = "batch + 1" if batch is None else f"{batch} + 1"
        raise ValueError(f"{name} must be [{want}], where sequences begin and end, got shape {list(offsets.shape)}")
    if offsets.device != device:
        raise ValueError(f"{name} must be on {device} like query_layer, got {offsets.device}; move it with .to()")


def _read(side: str, lengths: Lengths, batch: int | None, tokens: int | None, device: torch.device) -> tuple[Any, Any]:
    """(the longest sequence of `side`, "q" or "kv"; the values of its offsets and of its padded ones, which are the same if there
    are none), an error unless what `lengths` says of it is right. tokens: how many there are.

    Neither a compiler nor a graph that captures can read the offsets: they trust what the caller says, and the values are None.
    """
    name, maximum = f"cu_seqlens_{side}", f"max_seqlen_{side}"
    offsets, padded, longest = (getattr(lengths, key) for key in (name, f"{name}_padded", maximum))
    _check_form(name, offsets, batch, device)
    if padded is not None:
        _check_form(f"{name}_padded", padded, offsets.shape[0] - 1, device)
    if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int | torch.SymInt) or longest < 1):
        raise ValueError(f"{maximum} must be an int of at least 1, got {longest!r}")
    if _unreadable(offsets):
        if longest is None:
            raise ValueError(f"{maximum} must be given under torch.compile and in CUDA graphs, which cannot read it from {name}")
        return longest, None
    values = room = _values(name, offsets)
    true_longest = max(_steps(values))
    if padded is not None:
        room = _values(f"{name}_padded", padded)
        if any(length > most for length, most in zip(_steps(values), _steps(room))):
            raise ValueError(f"{name}_padded={room} leaves some sequence less room than its length in {name}={values}")
    if tokens is not None and room[-1] > tokens:
        raise ValueError(f"{name if padded is None else name + '_padded'} ends at {room[-1]}, but there are {tokens} tokens")
    if longest is not None and true_longest > longest:
        raise ValueError(f"{name} has a sequence of {true_longest} tokens, more than {maximum}={longest}")
    return max(true_longest, 1) if longest is None else longest, (values, room)


class Side(NamedTuple):
    """How the queries, or the keys, of format thd are packed: the arguments of `packing`, and whole: the host knows that every
    token is of a sequence.
    """

    offsets: torch.Tensor
    padded: torch.Tensor | None
    longest: int
    tokens: int
    whole: bool

    def packing(self) -> Packing:
        """The Packing that it means."""
        return packing(self.offsets, self.padded, self.longest, self.tokens)


def alike(query: Side, key: Side) -> bool:
    """Whether each sequence's queries lie as its keys do, as far as the host knows."""
    return query.offsets is key.offsets and query.padded is key.padded and query[2:] == key[2:]


def packings(query: Side, key: Side) -> tuple[Packing, Packing]:
    """The Packings of both, one object if they are alike."""
    packed = query.packing()
    return packed, packed if alike(query, key) else key.packing()


def sides(lengths: Lengths, queries: int, keys: int, device: torch.device) -> tuple[Side, Side]:
    """How `queries` and `keys` tokens of format thd are packed, one object if they are alike; TypeError or ValueError if `lengths`
    does not say so.
    """
    if lengths.cu_seqlens_q is None or lengths.cu_seqlens_kv is None:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_kv must be given with qkv_format='thd': int32 [batch + 1], where each sequence begins and "
            "the last one ends"
        )
    if lengths.pad_between_seqs and (lengths.cu_seqlens_q_padded is None or lengths.cu_seqlens_kv_padded is None):
        raise ValueError("pad_between_seqs=True needs cu_seqlens_q_padded and cu_seqlens_kv_padded")
    longest_q, read_q = _read("q", lengths, None, queries, device)
    longest_kv, read_kv = _read("kv", lengths, lengths.cu_seqlens_q.shape[0] - 1, keys, device)
    query = _side(lengths.cu_seqlens_q, lengths.cu_seqlens_q_padded, longest_q, queries, read_q)
    key = _side(lengths.cu_seqlens_kv, lengths.cu_seqlens_kv_padded, longest_kv, keys, read_kv)
    same = read_q is not None and read_q == read_kv and query[2:] == key[2:]
    return query, query if same or alike(query, key) else key


def _side(offsets: torch.Tensor, padded: torch.Tensor | None, longest: int, tokens: int, read: Any) -> Side:
    return Side(offsets, padded, longest, tokens, read is not None and read[0] == read[1] and read[1][-1] == tokens)


class Places(NamedTuple):
    """Where tokens stand: at positions below `longest`, sequence b from start_positions[b] (int [B]) on, 0 if None. cu_seqlens i32
    [B + 1]: where packed sequences begin and the last ends.
    """

    longest: int
    start_positions: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None


def _places(side: Side) -> Places:
    if side.padded is None:
        return Places(side.longest, None, side.offsets)
    longest = side.longest if _unreadable(side.padded) else max(_steps(_values("cu_seqlens_padded", side.padded)))
    return Places(longest, None, side.padded)


def packed_places(lengths: Lengths, queries: int, keys: int, device: torch.device) -> tuple[Places, Places]:
    """Where the queries and the keys of format thd stand, padding behind sequences too as far as it can be read, one object if
    they stand alike; errors as of `sides`.
    """
    query, key = sides(lengths, queries, keys, device)
    places = _places(query)
    return places, places if query is key else _places(key)


def padding_masks(
    lengths: Lengths, batch: int, queries: int, keys: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The padding masks [B, 1, 1, L] that `lengths` means in a padded batch of that size, None if it has no offsets."""
    if lengths.cu_seqlens_q_padded is not None or lengths.cu_seqlens_kv_padded is not None or lengths.pad_between_seqs:
        raise ValueError("cu_seqlens_q_padded, cu_seqlens_kv_padded and pad_between_seqs need qkv_format='thd'")
    for name, longest, length in (("q", lengths.max_seqlen_q, queries), ("kv", lengths.max_seqlen_kv, keys)):
        if longest is not None and longest != length:
            raise ValueError(f"max_seqlen_{name} must be the sequence length {length} unless qkv_format='thd', got {longest!r}")
    offsets_q, offsets_kv = lengths.cu_seqlens_q, lengths.cu_seqlens_kv
    if offsets_q is None and offsets_kv is None:
        return None
    if offsets_q is None or offsets_kv is None:
        raise ValueError("cu_seqlens_q and cu_seqlens_kv must be given both or neither")
    lengths = lengths._replace(max_seqlen_q=queries, max_seqlen_kv=keys)
    _read("q", lengths, batch, None, device)
    _read("kv", lengths, batch, None, device)
    query = torch.arange(queries, device=device) >= offsets_q.diff()[:, None]
    key = torch.arange(keys, device=device) >= offsets_kv.diff()[:, None]
    return query[:, None, None], key[:, None, None]
