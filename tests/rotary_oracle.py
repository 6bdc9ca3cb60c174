"""Rotary position embedding by complex numbers in float64: a pair of features is one number, turning it a multiplication."""

from __future__ import annotations

import torch


def frequencies(length: int, size: int, base: float = 10000.0, interleaved: bool = False) -> torch.Tensor:
    """f32 [length, 1, 1, size] angles of the paper, number by number."""
    rows = [[position * base ** (-2 * i / size) for i in range(size // 2)] for position in range(length)]
    angles = torch.tensor(rows, dtype=torch.float64).reshape(length, size // 2)
    doubled = torch.stack((angles, angles), -1).flatten(1) if interleaved else torch.cat((angles, angles), 1)
    return doubled.float()[:, None, None]


def place_table(outer: int, inner: int, batch_first: bool, starts=None, bounds=None) -> torch.Tensor:
    """[outer, inner] positions, token by token."""
    places = torch.zeros(outer, inner, dtype=torch.long)
    for a in range(outer):
        for b in range(inner):
            token, sequence = (b, a) if batch_first else (a, b)
            if bounds is not None:
                inside = [n for n in range(len(bounds) - 1) if bounds[n] <= token < bounds[n + 1]]
                if not inside:  # after the last sequence
                    continue
                sequence, token = inside[0], token - bounds[inside[0]]
            places[a, b] = token + (0 if starts is None else starts[sequence])
    return places


def turned(x: torch.Tensor, freqs: torch.Tensor, places: torch.Tensor, interleaved: bool, back: bool = False) -> torch.Tensor:
    """x [A, B, H, D] turned by the angles of its tokens' places [A, B], differentiable; both features of a pair have one angle."""
    size = freqs.shape[-1]
    x, angles = x.double(), freqs.double()[places, 0, 0][:, :, None]
    head = x[..., :size]
    first, second = (head[..., ::2], head[..., 1::2]) if interleaved else (head[..., : size // 2], head[..., size // 2 :])
    angles = angles[..., ::2] if interleaved else angles[..., : size // 2]
    z = torch.complex(first, second) * torch.exp(1j * (-angles if back else angles))
    parts = torch.stack((z.real, z.imag), -1).flatten(-2) if interleaved else torch.cat((z.real, z.imag), -1)
    return torch.cat((parts, x[..., size:]), -1)
