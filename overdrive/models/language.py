"""A GPT-2 and a Llama, of `TransformerLayer`s.

Shapes: B sequences, S tokens each, a vocabulary of V (by default 256, the bytes). Under an `autocast` the layers run in FP8;
embedding, last norm and head never do.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import overdrive.pytorch as te
from overdrive.models.config import ModelConfig
from overdrive.modules.checks import default_device

STD = 0.02


class LanguageModel(nn.Module):
    """Tokens [B, S] -> logits [B, S, V]; the next token of each position is what they predict.

    Weights ~ N(0, 0.02), those that end a residual branch smaller by sqrt(2 layers) (GPT-2). device: the GPU where there is one.
    """

    _layer: ClassVar[dict[str, Any]]
    _norm: ClassVar[type[nn.Module]]

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config = config
        options: dict[str, Any] = {"params_dtype": dtype, "device": default_device(device)}
        self.embedding = nn.Parameter(self._normal((config.vocabulary, config.hidden), **options))
        self.layers = nn.ModuleList(
            te.TransformerLayer(
                config.hidden,
                config.ffn or 0,
                config.heads,
                config.groups,
                layernorm_epsilon=config.epsilon,
                hidden_dropout=config.dropout,
                attention_dropout=config.dropout,
                init_method=partial(nn.init.normal_, std=STD),
                output_layer_init_method=partial(nn.init.normal_, std=STD / (2 * config.layers) ** 0.5),
                layer_number=number,
                fuse_qkv_params=True,
                qkv_weight_interleaved=False,
                attn_input_format="bshd",
                name=f"layer {number}",
                **self._layer,
                **options,
            )
            for number in range(1, config.layers + 1)
        )
        self.norm = self._norm(config.hidden, eps=config.epsilon, **options)
        self.head = self.embedding if config.tied else nn.Parameter(self._normal((config.vocabulary, config.hidden), **options))

    @staticmethod
    def _normal(shape: tuple[int, ...], params_dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=params_dtype, device=device).normal_(0.0, STD)

    def _embed(self, tokens: Tensor, cache: te.InferenceParams | None) -> Tensor:
        return F.embedding(tokens, self.embedding)

    def _positions(self, length: int) -> dict[str, Tensor]:
        """What each layer is told of the positions of `length` tokens."""
        return {}

    def cache(self, batch: int, **options: Any) -> te.InferenceParams:
        """What forward takes as inference_params, for up to `batch` sequences; options: see InferenceParams."""
        config, weight = self.config, self.embedding
        heads, channels = config.groups or config.heads, config.hidden // config.heads
        return te.InferenceParams(batch, config.context, heads, channels, weight.dtype, device=weight.device, **options)

    def forward(
        self,
        tokens: Tensor,
        is_first_microbatch: bool | None = None,
        recompute: bool = False,
        inference_params: te.InferenceParams | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """tokens: integers [B, S <= context]. is_first_microbatch: see Linear's. recompute: keep only each layer's input for
        backward. inference_params: from `cache`, its pre_step called; tokens then follow those that it has. last_only: logits
        [B, V] of the S-th tokens alone.
        """
        length = tokens.shape[-1]
        if length > self.config.context:
            raise ValueError(f"tokens: {length} of them came, the model's context is {self.config.context}; cut them")
        x = F.dropout(self._embed(tokens, inference_params), self.config.dropout, self.training)
        positions = self._positions(length if inference_params is None else self.config.context)
        options = {"is_first_microbatch": is_first_microbatch, "inference_params": inference_params, **positions}
        for layer in self.layers:
            x = te.checkpoint(layer, x, use_reentrant=False, **options) if recompute else layer(x, **options)
        return F.linear(self.norm(x[:, -1] if last_only else x), self.head)


class GPT(LanguageModel):
    """GPT-2: LayerNorm, gelu, biases, learned positions."""

    _layer: ClassVar[dict[str, Any]] = {}
    _norm = te.LayerNorm

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(config, device, dtype)
        self.position = nn.Parameter(self._normal((config.context, config.hidden), dtype, self.embedding.device))

    def _embed(self, tokens: Tensor, cache: te.InferenceParams | None) -> Tensor:
        batch, length = tokens.shape
        if cache is None:
            position = self.position[:length]
        else:
            place = cache.start_positions(batch)[:, None] + torch.arange(length, device=tokens.device)
            position = F.embedding(place.clamp(max=self.config.context - 1), self.position)  # what is after that is padding
        return super()._embed(tokens, cache) + position


class Llama(LanguageModel):
    """RMSNorm, SwiGLU, rotary positions, groups of heads sharing keys and values, no biases (arXiv:2307.09288)."""

    _layer: ClassVar[dict[str, Any]] = {"normalization": "RMSNorm", "activation": "swiglu", "bias": False}
    _norm = te.RMSNorm
    rotary: Tensor

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(config, device, dtype)
        angles = te.RotaryPositionEmbedding(config.hidden // config.heads, rotary_base=config.rotary_base)(config.context)
        self.register_buffer("rotary", angles.to(self.embedding.device), persistent=False)

    def _positions(self, length: int) -> dict[str, Tensor]:
        return {"rotary_pos_emb": self.rotary[:length]}


def build(config: ModelConfig, device: torch.device | str | None = None, dtype: torch.dtype = torch.bfloat16) -> LanguageModel:
    """The model that `config` describes, with parameters of `dtype` drawn from torch's generator."""
    return {"gpt": GPT, "llama": Llama}[config.kind](config, device, dtype)
