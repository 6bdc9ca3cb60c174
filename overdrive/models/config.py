"""What a model is built from: plain values, kept in checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

KINDS = ("gpt", "llama")
BYTES = 256


class ArgumentError(ValueError):
    """A value that cannot be used; `argument` is the name of what it came in."""

    def __init__(self, argument: str, message: str) -> None:
        super().__init__(message)
        self.argument = argument


@dataclass
class ModelConfig:
    """A language model, over bytes unless told otherwise. ArgumentError for sizes that do not fit together.

    kind: "gpt" (LayerNorm, gelu, biases, learned positions; GPT-2) or "llama" (RMSNorm, SwiGLU, rotary positions, no biases;
    arXiv:2307.09288). heads: of queries; groups: of keys and values, as many as heads for None (arXiv:2305.13245). ffn: hidden size
    of the MLP; None is 4 x hidden, and 8/3 x hidden rounded up to a multiple of 128 for a Llama, whose MLP has three weights.
    context: the most tokens seen at once. tied: the head is the transposed embedding. vocabulary: how many tokens there are.
    epsilon: of every norm. rotary_base: of a Llama's rotary positions.
    """

    kind: str = "gpt"
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    groups: int | None = None
    ffn: int | None = None
    context: int = 128
    dropout: float = 0.0
    tied: bool = True
    vocabulary: int = BYTES
    epsilon: float = 1e-5
    rotary_base: float = 10000.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ArgumentError("kind", f"{self.kind!r} is not a kind of model; there are {', '.join(KINDS)}.")
        if self.groups is None:
            self.groups = self.heads
        for name in ("layers", "hidden", "heads", "groups", "context", "vocabulary"):
            self._check_size(name)
        if self.ffn is None:
            self.ffn = 4 * self.hidden if self.kind == "gpt" else -(-8 * self.hidden // (3 * 128)) * 128
        self._check_size("ffn")
        if self.hidden % self.heads:
            raise ArgumentError("heads", f"{self.heads} heads do not divide the hidden size {self.hidden}.")
        if self.heads % self.groups:
            raise ArgumentError("groups", f"{self.groups} groups of keys and values do not divide {self.heads} heads.")
        if self.kind == "llama" and self.hidden // self.heads % 2:
            channels = self.hidden // self.heads
            raise ArgumentError("heads", f"{self.heads} heads have {channels} channels each; rotary positions need an even number.")
        if not 0 <= self.dropout <= 1:
            raise ArgumentError("dropout", f"{self.dropout!r} is not a probability; it takes a number from 0 to 1.")
        for name in ("epsilon", "rotary_base"):
            if not 0 < getattr(self, name) < math.inf:
                raise ArgumentError(name, f"{getattr(self, name)!r} came; it takes a number above 0.")

    def _check_size(self, name: str) -> None:
        value: Any = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(name, f"{value!r} came; it takes a whole number of at least 1.")


def _sizes(layers: int, hidden: int, heads: int, groups: int, ffn: int | None, context: int) -> dict[str, dict[str, Any]]:
    common = {"layers": layers, "hidden": hidden, "heads": heads, "context": context}
    return {"gpt": common, "llama": common | {"groups": groups, "ffn": ffn}}


SIZES = {
    "tiny": _sizes(4, 128, 4, 2, None, 128),
    "124M": _sizes(12, 768, 12, 4, None, 1024),
    "350M": _sizes(24, 1024, 16, 4, None, 1024),
    "1B": _sizes(16, 2048, 32, 8, 8192, 2048),
}
"""Arguments of ModelConfig by size and kind. The names count an embedding of some 50,000 words; bytes need less."""
