"""The helpers that Transformer Engine's quickstart tutorial imports as `quickstart_utils`; they ship with `overdrive.cli`."""

from overdrive.cli.tutorial import *  # noqa: F403
from overdrive.cli.tutorial import __all__ as __all__
