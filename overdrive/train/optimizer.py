"""AdamW for parameters of any dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.95)


class MasterAdamW:
    """AdamW (arXiv:1711.05101) that sums gradients and updates in float32.

    A parameter of less precision would round small updates away: it gets a float32 master copy, which it follows. Weight decay
    acts on matrices only, not on norms and biases. clip: the most that the norm of all gradients may be, 0 for any.
    """

    def __init__(self, module: nn.Module, weight_decay: float, clip: float) -> None:
        self.parameters = list(module.parameters())
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]
        self.copied = [(p, m) for p, m in zip(self.parameters, self.masters) if p is not m]
        self.clip = clip
        matrices = [m for m in self.masters if m.dim() > 1]
        vectors = [m for m in self.masters if m.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, betas=BETAS, fused=True)

    def take_gradients(self) -> None:
        """Add the gradients of a backward to those of the step."""
        for parameter, master in self.copied:
            if parameter.grad is not None:
                gradient, parameter.grad = parameter.grad, None
                master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)

    def step(self, rate: float) -> Tensor:
        """Take a step with the gradients so far and forget them; their norm f32 [] before clipping."""
        norm = nn.utils.clip_grad_norm_(self.masters, self.clip or float("inf"))
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.adam.zero_grad()
        if self.copied:
            with torch.no_grad():
                torch._foreach_copy_([p for p, _ in self.copied], [m for _, m in self.copied])
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Moments and masters."""
        return {"adam": self.adam.state_dict(), "masters": [master for _, master in self.copied]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; ValueError or RuntimeError if it is of other parameters."""
        self.adam.load_state_dict(state["adam"])
        if [m.shape for m in state["masters"]] != [m.shape for _, m in self.copied]:
            raise ValueError("the master copies have other shapes than the parameters")
        with torch.no_grad():
            for (_, master), saved in zip(self.copied, state["masters"]):
                master.copy_(saved)
