"""The names users of Transformer Engine write: `import overdrive.pytorch as te`."""

from typing import TYPE_CHECKING

from overdrive import __version__
from overdrive.functional.attention_backends import attention_backends
from overdrive.modules.attention import DotProductAttention
from overdrive.modules.graphs import make_graphed_callables
from overdrive.modules.inference import InferenceParams
from overdrive.modules.layernorm import LayerNorm, RMSNorm
from overdrive.modules.layernorm_linear import LayerNormLinear
from overdrive.modules.layernorm_mlp import LayerNormMLP
from overdrive.modules.linear import Linear
from overdrive.modules.multihead_attention import MultiheadAttention
from overdrive.modules.rotary import RotaryPositionEmbedding, apply_rotary_pos_emb
from overdrive.modules.transformer import TransformerLayer
from overdrive.parallel.checkpoint import checkpoint
from overdrive.scaling.autocast import autocast, fp8_autocast, get_default_recipe
from overdrive.scaling.float8_tensor import Float8Tensor
from overdrive.scaling.quantized_init import fp8_model_init, quantized_model_init
from overdrive.scaling.support import (
    is_bf16_available,
    is_fp8_available,
    is_fp8_block_scaling_available,
    is_mxfp8_available,
    is_nvfp4_available,
)

__all__ = [
    "DotProductAttention",
    "Float8Tensor",
    "InferenceParams",
    "LayerNorm",
    "LayerNormLinear",
    "LayerNormMLP",
    "Linear",
    "MultiheadAttention",
    "RMSNorm",
    "RotaryPositionEmbedding",
    "TransformerLayer",
    "__version__",
    "apply_rotary_pos_emb",
    "attention_backends",
    "autocast",
    "checkpoint",
    "fp8_autocast",
    "fp8_model_init",
    "get_default_recipe",
    "is_bf16_available",
    "is_fp8_available",
    "is_fp8_block_scaling_available",
    "is_mxfp8_available",
    "is_nvfp4_available",
    "make_graphed_callables",
    "quantized_model_init",
]

_LATER = (
    "Fp8Padding",
    "Fp8Unpadding",
    "GroupedLinear",
)


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name in _LATER:
            raise AttributeError(f"overdrive.pytorch.{name} is not built yet; see the feature table in the README")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
