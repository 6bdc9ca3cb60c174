"""Everything that determines a training run: plain values, kept in its checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from overdrive.models.config import ModelConfig

MAY_CHANGE = frozenset({"steps", "minutes", "save_every", "validate_every", "recompute", "texts", "recipes"})
"""What a resumed run may have otherwise than before. steps and minutes stretch the schedule to a new end; the others change no
number: texts say only where the text lies, and text_sha256 what it says."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "tiny": {"minutes": 0.75},
    "124M": {"batch": 32, "steps": 1000, "warmup": 100, "learning_rate": 6e-4, "validate_every": 100},
    "350M": {"batch": 16, "steps": 1000, "warmup": 100, "learning_rate": 3e-4, "validate_every": 100},
    "1B": {"batch": 4, "accumulate": 4, "steps": 1000, "warmup": 100, "learning_rate": 2e-4, "validate_every": 100},
}
"""What suits each size of overdrive.models.SIZES, beside the defaults of Settings. A CPU ends the first within a minute."""


@dataclass
class Settings:
    """One run.

    recipe: "bf16" or an FP8 recipe's name; recipes: all that the command compares. batch: sequences of a microbatch, each of
    model.context bytes; accumulate: microbatches of a step. steps: where the cosine ends; None for as many as fit into
    `minutes`, counted after `warmup` steps. minutes: when to stop at the latest. amp: float32 parameters under torch.autocast
    instead of bf16 ones with float32 masters. clip: the most that the norm of all gradients may be, 0 for any. recompute:
    activation checkpointing. deterministic: on a GPU only kernels that give the same bits each time. *_every: in steps.
    """

    model: ModelConfig
    recipe: str = "bf16"
    recipes: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    text_sha256: str = ""
    seed: int = 0
    batch: int = 8
    accumulate: int = 1
    steps: int | None = 300
    minutes: float | None = None
    warmup: int = 20
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    amp: bool = False
    recompute: bool = False
    deterministic: bool = False
    save_every: int = 100
    validate_every: int = 50

    @property
    def step_tokens(self) -> int:
        """Bytes that a step learns from."""
        return self.batch * self.accumulate * self.model.context

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """What `to_dict` gave; TypeError or ValueError for anything else."""
        return cls(**{**values, "model": ModelConfig(**values["model"])})


def conflict(ours: Settings, theirs: Settings) -> tuple[str, Any, Any] | None:
    """(name, our value, their value) of the first field that must be equal in one run and is not."""
    pairs = [(ours.model, theirs.model, f.name) for f in fields(ModelConfig)]
    pairs += [(ours, theirs, f.name) for f in fields(Settings) if f.name != "model" and f.name not in MAY_CHANGE]
    return next(((name, getattr(a, name), getattr(b, name)) for a, b, name in pairs if getattr(a, name) != getattr(b, name)), None)
