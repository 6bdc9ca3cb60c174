"""Training of `overdrive.models` on text: what `overdrive train` does, without its command line."""

from overdrive.train.checkpoint import CheckpointError, DiskError, load, read_model, read_settings, save
from overdrive.train.data import Text, standard_library
from overdrive.train.log import Log, Row
from overdrive.train.loop import DivergedError, Trainer, fit
from overdrive.train.settings import Settings, conflict

__all__ = [
    "CheckpointError",
    "DiskError",
    "DivergedError",
    "Log",
    "Row",
    "Settings",
    "Text",
    "Trainer",
    "conflict",
    "fit",
    "load",
    "read_model",
    "read_settings",
    "save",
    "standard_library",
]
