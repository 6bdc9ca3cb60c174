"""Activation checkpointing under Transformer Engine's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint as torch_checkpoint


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    use_reentrant: bool = True,
    distribute_saved_activations: bool = False,
    tp_group: Any = None,
    get_rng_state_tracker: Any = None,
    **kwargs: Any,
) -> Any:
    """`function(*args, **kwargs)`, recomputed in backward instead of kept.

    The same as torch.utils.checkpoint.checkpoint, which overdrive's layers understand as well: the recomputation uses the
    recipe and the scales of the forward. With use_reentrant=True keyword arguments are passed on too.
    """
    for name, value in (("distribute_saved_activations", distribute_saved_activations or None), ("tp_group", tp_group)):
        if value is not None:
            raise NotImplementedError(f"checkpoint: {name}={value!r} is not supported (parallelism is not built yet); leave it out")
    if get_rng_state_tracker is not None:
        raise NotImplementedError(
            "checkpoint: get_rng_state_tracker is not supported yet; torch's own generators are restored without it"
        )
    if use_reentrant and kwargs:
        return torch_checkpoint(lambda *inputs: function(*inputs, **kwargs), *args, use_reentrant=True)
    return torch_checkpoint(function, *args, use_reentrant=use_reentrant, **kwargs)
