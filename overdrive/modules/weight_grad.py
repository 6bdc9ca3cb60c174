"""Weight gradients that do not take autograd's way: added into `main_grad`, or computed later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from overdrive.functional.gemm import GemmOptions, weight_gradient
from overdrive.scaling.tensor import Operand


class WeightGradStore:
    """fuse: add into `weight.main_grad` and set `grad_added_to_main_grad`. delay: keep the operands until `run`."""

    def __init__(self, fuse: bool = False, delay: bool = False) -> None:
        self.fuse, self.delay = fuse, delay
        self._waiting: list[Callable[[], None]] = []

    def attach(self, options: GemmOptions, weights: tuple[torch.Tensor, ...], first_microbatch: bool | None) -> GemmOptions:
        """Options whose weight gradients come here, where that was asked for."""
        if not (self.fuse or self.delay):
            return options

        def sink(dy: Operand, x: Operand) -> tuple[None, ...]:
            if self.delay:
                self._waiting.append(lambda: self._deliver(dy, x, options, weights, first_microbatch))
            else:
                self._deliver(dy, x, options, weights, first_microbatch)
            return (None,) * len(weights)

        return replace(options, sink=sink)

    def run(self) -> None:
        """Compute what was delayed, oldest first."""
        waiting, self._waiting = self._waiting, []
        for compute in waiting:
            compute()

    def _deliver(
        self, dy: Operand, x: Operand, options: GemmOptions, weights: tuple[torch.Tensor, ...], first_microbatch: bool | None
    ) -> None:
        wanted = [weight for weight in weights if weight.requires_grad]
        dtype = _main_grad(wanted[0]).dtype if self.fuse else options.dtype
        with torch.no_grad():
            parts = weight_gradient(dy, x, options, dtype).split(options.splits)
            for weight, part in zip(weights, parts):
                if not weight.requires_grad:
                    continue
                if self.fuse:
                    target = _main_grad(weight)
                    target.copy_(part) if first_microbatch else target.add_(part)
                    weight.grad_added_to_main_grad = True  # pyright: ignore[reportAttributeAccessIssue]
                else:
                    part = part.to(weight.dtype)
                    weight.grad = part if weight.grad is None else weight.grad + part


def _main_grad(weight: torch.Tensor) -> torch.Tensor:
    main_grad = getattr(weight, "main_grad", None)
    if not isinstance(main_grad, torch.Tensor) or main_grad.shape != weight.shape:
        raise RuntimeError(
            f"fuse_wgrad_accumulation=True needs a tensor weight.main_grad of shape {list(weight.shape)} before "
            f"backward, got {main_grad!r:.80}"
        )
    return main_grad
