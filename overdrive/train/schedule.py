"""The learning rate over a run."""

import math

FLOOR = 0.1


def cosine(step: int, peak: float, warmup: int, total: int | None) -> float:
    """Rate of step number `step`, counted from 0: up to `peak` in a line over `warmup` steps, then along half a cosine down to a
    tenth of it at `total` (arXiv:1608.03983). While `total` is not known (None) it stays at the peak.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if total is None or total <= warmup:
        return peak
    progress = min((step - warmup) / (total - warmup), 1.0)
    return peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))
