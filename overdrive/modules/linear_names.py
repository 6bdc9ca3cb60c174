"""How the parameters of a GEMM are called."""

from __future__ import annotations


class LinearNames:
    """Names of the parameters that make up one weight and its bias, and how many rows each has."""

    def __init__(self, prefix: str, sizes: dict[str, int] | None, rows: int, bias: bool) -> None:
        parts = [f"{name}_" for name in sizes] if sizes else [prefix]
        self.fused = (f"{prefix}weight", f"{prefix}bias")
        self.weights = tuple(f"{part}weight" for part in parts)
        self.biases = tuple(f"{part}bias" for part in parts) if bias else ()
        self.sizes = tuple(sizes.values()) if sizes else (rows,)
        self.split = self.weights[0] != self.fused[0]
        """Whether the parameters are the parts of parameters_split, not the weight and bias themselves."""
