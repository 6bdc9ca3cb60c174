"""`RotaryPositionEmbedding`, the angles, and `apply_rotary_pos_emb`, turning by them (arXiv:2104.09864)."""

from __future__ import annotations

import math
from typing import Any

import torch

from overdrive.functional.packing import Places
from overdrive.functional.rotary import rotate
from overdrive.modules.checks import default_device, one_of, positive_int, refuse

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _above_zero(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"RotaryPositionEmbedding: {name} must be a finite number above 0, got {value!r}")
    return float(value)


class RotaryPositionEmbedding(torch.nn.Module):
    """Angles position * rotary_base^(-2i / R) for the pairs i < R / 2 of R = dim * rotary_percent features.

    dim: channels per head; those from R on are left alone. seq_len_interpolation_factor, only together with
    pretrained_max_position_embeddings: positions are divided by the factor, or, in a sequence longer than the product of both, by
    max_seq_len / pretrained_max_position_embeddings (arXiv:2306.15595). interleaved: a pair is the features 2i and 2i + 1, else i
    and R / 2 + i; `apply_rotary_pos_emb` or the layer must be told the same. `inv_freq` stays f32 whatever the module is converted
    to; a checkpoint may lack it. Arguments out of range raise ValueError or TypeError.
    """

    inv_freq: torch.Tensor

    def __init__(
        self,
        dim: int,
        rotary_percent: float = 1.0,
        seq_len_interpolation_factor: float | None = None,
        pretrained_max_position_embeddings: int | None = None,
        rotary_base: float = 10000.0,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        if _above_zero("rotary_percent", rotary_percent) > 1:
            raise ValueError(f"RotaryPositionEmbedding: rotary_percent must be at most 1, got {rotary_percent}")
        self.dim = int(positive_int("RotaryPositionEmbedding", "dim", dim) * rotary_percent)
        if self.dim % 2 or not self.dim:
            raise ValueError(
                f"RotaryPositionEmbedding: dim={dim} and rotary_percent={rotary_percent} give {self.dim} features to turn; choose "
                "them to give an even number above 0, as features turn in pairs"
            )
        if (seq_len_interpolation_factor is None) != (pretrained_max_position_embeddings is None):
            raise ValueError(
                f"RotaryPositionEmbedding: seq_len_interpolation_factor={seq_len_interpolation_factor} and "
                f"pretrained_max_position_embeddings={pretrained_max_position_embeddings} act together only; give both or neither"
            )
        if seq_len_interpolation_factor is not None:
            _above_zero("seq_len_interpolation_factor", seq_len_interpolation_factor)
            positive_int("RotaryPositionEmbedding", "pretrained_max_position_embeddings", pretrained_max_position_embeddings)
        self.seq_len_interpolation_factor = seq_len_interpolation_factor
        self.pretrained_max_position_embeddings = pretrained_max_position_embeddings
        self.rotary_base = _above_zero("rotary_base", rotary_base)
        self.interleaved = interleaved
        self.register_buffer("inv_freq", self._inverse_frequencies(default_device(None)))

    def _inverse_frequencies(self, device: torch.device) -> torch.Tensor:
        return self.rotary_base ** -(torch.arange(0, self.dim, 2, dtype=torch.float32, device=device) / self.dim)

    def forward(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        """f32 [max_seq_len, 1, 1, R]: the angles of positions offset .. offset + max_seq_len - 1."""
        positive_int("RotaryPositionEmbedding", "max_seq_len", max_seq_len)
        position = torch.arange(max_seq_len, dtype=torch.float32, device=self.inv_freq.device) + offset
        trained, factor = self.pretrained_max_position_embeddings, self.seq_len_interpolation_factor
        if trained is not None and factor is not None:
            position = position / (max_seq_len / trained if max_seq_len > trained * factor else factor)
        angles = position[:, None] * self.inv_freq
        return (angles.repeat_interleave(2, 1) if self.interleaved else angles.repeat(1, 2))[:, None, None]

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryPositionEmbedding:
        exact = self.inv_freq
        super()._apply(fn, recurse)
        device = self.inv_freq.device
        self.inv_freq = self._inverse_frequencies(device) if exact.device.type == "meta" else exact.to(device)
        return self

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: Any, prefix: str, *arguments: Any
    ) -> None:
        state_dict.setdefault(prefix + "inv_freq", self.inv_freq)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        return f"{self.dim}, rotary_base={self.rotary_base}, interleaved={self.interleaved}"


def apply_rotary_pos_emb(
    t: torch.Tensor,
    freqs: torch.Tensor,
    tensor_format: str = "sbhd",
    start_positions: torch.Tensor | None = None,
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> torch.Tensor:
    """t, [S, B, H, D] with "sbhd", [B, S, H, D] with "bshd", [T, H, D] with "thd", turned by freqs; contiguous, in t's dtype.

    freqs: f32 [P, 1, 1, R], R <= D, from a RotaryPositionEmbedding as `interleaved` as this; P at least the longest sequence, its
    start included. Features from R on come back as they are. start_positions: int [B], the position of each sequence's first token,
    0 unless given. cu_seqlens: with "thd" and nowhere else, i32 [sequences + 1], where sequences begin and the last ends; tokens
    after that take position 0. One kernel computes in f32 whatever `fused` says.

    ValueError or TypeError for what does not fit. Contents of start_positions and cu_seqlens are checked on the CPU only, as a GPU
    would have to be waited for: there a position that freqs does not have, and any if cu_seqlens does not ascend from 0, gives NaN.
    """
    name = "apply_rotary_pos_emb"
    refuse(name, {"cp_size": (cp_size, 1), "cp_rank": (cp_rank, 0)})
    packed = one_of(name, "tensor_format", tensor_format, ("sbhd", "bshd", "thd")) == "thd"
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name}: t must be a tensor, got {type(t).__name__}")
    if t.dim() != len(tensor_format):
        dims, got = ", ".join(tensor_format), list(t.shape)
        raise ValueError(f"{name}: t must be [{dims}], as tensor_format is {tensor_format!r}; got {got}")
    if packed != (cu_seqlens is not None):
        state = "missing" if packed else "given"
        raise ValueError(f"{name}: cu_seqlens goes with tensor_format 'thd' and only there; it is {state}, with {tensor_format!r}")
    sequence_dim = tensor_format.index("t" if packed else "s")
    check_freqs(name, "freqs", freqs, "t", t, 0 if packed else t.shape[sequence_dim])
    if cu_seqlens is not None:
        _check_indices("cu_seqlens", cu_seqlens, (torch.int32,), t.device)
    if start_positions is not None:
        _check_indices("start_positions", start_positions, (torch.int32, torch.int64), t.device)
        batch = t.shape[1 - sequence_dim] if cu_seqlens is None else len(cu_seqlens) - 1
        if len(start_positions) != batch:
            raise ValueError(
                f"{name}: start_positions must have one entry for each of {batch} sequences, got {len(start_positions)}"
            )
    contents = start_positions is not None or cu_seqlens is not None
    if contents and t.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_positions(t.shape[sequence_dim], freqs, start_positions, cu_seqlens)
    x = t.unsqueeze(1) if packed else t
    out, _ = rotate(x, None, freqs, interleaved, tensor_format == "bshd", start_positions, cu_seqlens)
    return out.squeeze(1) if packed else out


def rotate_query_and_key(
    module: str,
    query: torch.Tensor,
    key: torch.Tensor,
    rotary_pos_emb: Any,
    layout: str,
    interleaved: bool,
    places: tuple[Places, Places] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Q and K [S, B, .., D], [B, S, .., D] with "bshd", [T, .., D] with "thd", turned by rotary_pos_emb: f32 [P, 1, 1, R], or one
    each.

    places: of Q and K, one object if they stand alike; None, not with "thd", if every sequence begins at position 0.
    """
    pair = rotary_pos_emb if isinstance(rotary_pos_emb, (tuple, list)) else (rotary_pos_emb, rotary_pos_emb)
    if len(pair) != 2:
        raise ValueError(f"{module}: rotary_pos_emb must be one tensor, or two, for Q and for K; got {len(pair)}")
    batch_first, packed = layout == "bshd", layout == "thd"
    together = pair[0] is pair[1] and query.shape[:-2] == key.shape[:-2]
    if places is None:
        dim = 1 if batch_first else 0
        places = Places(query.shape[dim]), Places(key.shape[dim])
    else:
        together = together and places[0] is places[1]
    for x, freqs, place in ((query, pair[0], places[0]), (key, pair[1], places[1]))[: 1 if together else 2]:
        check_freqs(module, "rotary_pos_emb", freqs, "hidden_states", x, place.longest)
    if packed:
        query, key = query.unsqueeze(1), key.unsqueeze(1)
    options = (interleaved, batch_first)
    if together:
        query, key = rotate(query, key, pair[0], *options, *places[0][1:])
    else:
        query = rotate(query, None, pair[0], *options, *places[0][1:])[0]
        key = rotate(key, None, pair[1], *options, *places[1][1:])[0]
    return (query.squeeze(1), key.squeeze(1)) if packed else (query, key)


def check_freqs(module: str, name: str, freqs: Any, what: str, x: torch.Tensor, length: int) -> None:
    """An error unless freqs, the argument `name`, can turn `length` positions of x [.., D], which comes from argument `what`."""
    if not isinstance(freqs, torch.Tensor) or freqs.dtype != torch.float32:
        got = freqs.dtype if isinstance(freqs, torch.Tensor) else type(freqs).__name__
        raise TypeError(f"{module}: {name} must be a tensor of {torch.float32}, as RotaryPositionEmbedding gives; got {got}")
    if x.dtype not in _DTYPES:
        allowed = ", ".join(map(str, _DTYPES))
        raise TypeError(f"{module}: {what}, turned by {name}, must be one of {allowed}; got {x.dtype}, convert it with .to()")
    if freqs.dim() != 4 or freqs.shape[1] != 1 or freqs.shape[2] != 1:
        raise ValueError(f"{module}: {name} must be [positions, 1, 1, features], got {list(freqs.shape)}")
    if freqs.shape[3] % 2 or not 0 < freqs.shape[3] <= x.shape[-1]:
        raise ValueError(
            f"{module}: {name} turns {freqs.shape[3]} of the {x.shape[-1]} features of a head; it must turn an even number above "
            "0, and no more than there are"
        )
    if freqs.device != x.device:
        raise ValueError(f"{module}: {name} is on {freqs.device}, {what} on {x.device}; move one of them with .to()")
    if freqs.shape[0] < length:
        raise ValueError(
            f"{module}: {name} has {freqs.shape[0]} positions, the sequence {length}; make it with RotaryPositionEmbedding's "
            f"max_seq_len >= {length}"
        )
    if freqs.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(f"{module}: {name} requires grad, which it would not get; detach() it")


def _check_indices(name: str, x: Any, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    if not isinstance(x, torch.Tensor) or x.dtype not in dtypes:
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"apply_rotary_pos_emb: {name} must be a tensor of {' or '.join(map(str, dtypes))}, got {got}")
    if x.dim() != 1 or (name == "cu_seqlens" and not len(x)):
        size = "[sequences + 1]" if name == "cu_seqlens" else "[sequences]"
        raise ValueError(f"apply_rotary_pos_emb: {name} must be {size}, got {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"apply_rotary_pos_emb: {name} is on {x.device}, t on {device}; move one of them with .to()")


def _check_positions(
    length: int, freqs: torch.Tensor, start_positions: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> None:
    """Contents: cu_seqlens ascends from 0 to at most `length`, and freqs has every position."""
    lengths = torch.tensor([length]) if cu_seqlens is None else cu_seqlens.diff()
    starts = torch.tensor([0]) if start_positions is None else start_positions
    if cu_seqlens is not None and (cu_seqlens[0] != 0 or (lengths < 0).any() or cu_seqlens[-1] > length):
        got = cu_seqlens.tolist()
        raise ValueError(f"apply_rotary_pos_emb: cu_seqlens must ascend from 0 to at most t's {length} tokens, got {got}")
    wrong = ((starts < 0) | (starts + lengths > len(freqs))).nonzero()
    if len(wrong):
        name, which = "cu_seqlens" if start_positions is None else "start_positions", int(wrong[0])
        starts, ends = torch.broadcast_tensors(starts, starts + lengths)
        first, last = int(starts[which]), int(ends[which]) - 1
        raise ValueError(
            f"apply_rotary_pos_emb: {name} asks for positions {first} to {last} in sequence {which}, freqs has {len(freqs)}"
        )
