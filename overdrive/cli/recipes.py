"""The recipes by the names that the command line uses."""

from enum import Enum

from overdrive.common import recipe


class RecipeName(str, Enum):
    """What `--recipe` takes."""

    DELAYED = "delayed"
    CURRENT = "current"
    BLOCK = "block"
    MXFP8 = "mxfp8"
    NVFP4 = "nvfp4"


RECIPES = {
    RecipeName.DELAYED: recipe.DelayedScaling(amax_history_len=16),
    RecipeName.CURRENT: recipe.Float8CurrentScaling(),
    RecipeName.BLOCK: recipe.Float8BlockScaling(),
    RecipeName.MXFP8: recipe.MXFP8BlockScaling(),
    RecipeName.NVFP4: recipe.NVFP4BlockScaling(),
}
DEFAULT_RECIPES = [RecipeName.DELAYED, RecipeName.CURRENT, RecipeName.BLOCK]
