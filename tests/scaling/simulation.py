"""Delayed scaling step by step in plain Python and numpy, from TE-SPEC's rules; nothing here knows overdrive's arena or ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

FP32_MAX = np.float32(np.finfo(np.float32).max)


class SimulatedSlot:
    """One tensor's amax history and scale, in f32."""

    def __init__(
        self,
        fp8_max: float,
        length: int,
        algo: str | Callable[[list[np.float32]], np.float32] = "max",
        margin: float = 0,
        scale_algo: Callable[[np.float32, np.float32, float], np.float32] | None = None,
    ) -> None:
        self.fp8_max, self.length, self.algo, self.margin, self.scale_algo = fp8_max, length, algo, margin, scale_algo
        self.history: list[np.float32] = []  # newest first
        self.pending: np.float32 | None = None
        self.scale = np.float32(1)

    def record(self, x: np.ndarray) -> None:
        """Note a tensor's largest magnitude; several in one step count together, and NaN is the largest of all."""
        amax = np.abs(x).max() if x.size else np.float32(0)
        self.pending = amax if self.pending is None else np.maximum(self.pending, amax)

    def end_step(self) -> None:
        """Roll the history and compute the next scale, if this step recorded anything."""
        if self.pending is None:
            return
        self.history = [self.pending, *self.history][: self.length]
        self.pending = None
        if self.algo == "max":
            amax = np.max(self.history)
        elif self.algo == "most_recent":
            amax = self.history[0]
        else:
            amax = self.algo(self.history + [np.float32(0)] * (self.length - len(self.history)))
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if self.scale_algo is not None:
                self.scale = np.float32(self.scale_algo(amax, self.scale, self.fp8_max))
            elif np.isfinite(amax) and amax > 0:
                scale = np.float32(self.fp8_max) * np.float32(2.0**-self.margin) / amax
                self.scale = FP32_MAX if np.isinf(scale) else scale


def tensors(shape: tuple[int, int], seed: int, odd: float = 0.1) -> Iterator[torch.Tensor]:
    """f32 tensors whose size wanders; one in five of the `odd` ones each is all zeros, has an infinity, a NaN, is tiny, is huge."""
    rng = np.random.default_rng(seed)
    level = 0.0
    while True:
        level = 0.98 * level + rng.normal()
        x = rng.normal(size=shape).astype(np.float32) * np.float32(2.0**level)
        event = int(rng.random() / odd * 5)
        if event == 0:
            x[:] = 0
        elif event == 1:
            x[tuple(rng.integers(shape))] = rng.choice([np.inf, -np.inf])
        elif event == 2:
            x[tuple(rng.integers(shape))] = np.nan
        elif event == 3:
            x *= np.float32(1e-44)
        elif event == 4:
            x *= np.float32(1e35)
        yield torch.from_numpy(x)
