"""What does not depend on a framework: `overdrive.common.recipe`."""

from overdrive.common import recipe

__all__ = ["recipe"]
