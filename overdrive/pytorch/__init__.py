"""The names users of Transformer Engine write: `import overdrive.pytorch as te`."""

from overdrive import __version__
from overdrive.modules.layernorm import LayerNorm, RMSNorm
from overdrive.modules.layernorm_linear import LayerNormLinear
from overdrive.modules.layernorm_mlp import LayerNormMLP
from overdrive.modules.linear import Linear
from overdrive.parallel.checkpoint import checkpoint
from overdrive.scaling.autocast import autocast, fp8_autocast, get_default_recipe
from overdrive.scaling.float8_tensor import Float8Tensor
from overdrive.scaling.support import (
    is_bf16_available,
    is_fp8_available,
    is_fp8_block_scaling_available,
    is_mxfp8_available,
    is_nvfp4_available,
)

__all__ = [
    "Float8Tensor",
    "LayerNorm",
    "LayerNormLinear",
    "LayerNormMLP",
    "Linear",
    "RMSNorm",
    "__version__",
    "autocast",
    "checkpoint",
    "fp8_autocast",
    "get_default_recipe",
    "is_bf16_available",
    "is_fp8_available",
    "is_fp8_block_scaling_available",
    "is_mxfp8_available",
    "is_nvfp4_available",
]
