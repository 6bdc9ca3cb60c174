"""Text from a model, one byte at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from overdrive.models.language import LanguageModel


def next_logits(model: LanguageModel, tokens: list[int]) -> Tensor:
    """Logits f32 [256] of the byte after `tokens`, from as many of the last as the context holds, all of them computed anew."""
    window = tokens[-model.config.context :]
    with torch.inference_mode():
        return model(torch.tensor([window], device=model.embedding.device))[0, -1].float()


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """A byte from softmax(logits / temperature), only among the likeliest whose probabilities reach top_p together
    (arXiv:1904.09751); temperature 0 takes the likeliest.
    """
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits / temperature).softmax(-1).sort(descending=True)
    ahead = probabilities.cumsum(-1) - probabilities  # of those likelier than each
    kept = probabilities.where(ahead < top_p, 0.0)
    kept[0] = probabilities[0]
    return int(order[torch.multinomial(kept, 1, generator=generator)])


def generate(
    model: LanguageModel, prompt: bytes, count: int, temperature: float = 0.8, top_p: float = 0.95, seed: int = 0
) -> Iterator[int]:
    """`count` bytes that follow `prompt`, each as soon as it is known; the same ones for the same seed and device.

    An empty prompt stands for a new line. temperature: 0 always takes the likeliest byte. top_p: 1 leaves out none.
    """
    generator = torch.Generator(model.embedding.device).manual_seed(seed)
    tokens = list(prompt or b"\n")
    model.eval()
    for _ in range(count):
        tokens.append(draw(next_logits(model, tokens), temperature, top_p, generator))
        yield tokens[-1]
