"""Language models over bytes, built from overdrive's layers."""

from overdrive.models.config import SIZES, ArgumentError, ModelConfig
from overdrive.models.generation import generate, generate_batch
from overdrive.models.language import GPT, LanguageModel, Llama, build

__all__ = ["GPT", "SIZES", "ArgumentError", "LanguageModel", "Llama", "ModelConfig", "build", "generate", "generate_batch"]
