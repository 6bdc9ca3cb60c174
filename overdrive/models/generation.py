"""Text from a model, one byte at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from overdrive.models.language import LanguageModel
from overdrive.pytorch import InferenceParams


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


def cached_logits(model: LanguageModel, cache: InferenceParams, new: dict[int, list[int]]) -> Tensor:
    """Logits f32 [sequences, 256] of the byte after each sequence, of which `cache` has what came before its `new` tokens."""
    lengths = [len(tokens) for tokens in new.values()]
    padded = [tokens + [0] * (max(lengths) - len(tokens)) for tokens in new.values()]
    cache.pre_step(dict(zip(new, lengths)))
    with torch.inference_mode():
        logits = model(torch.tensor(padded, device=model.embedding.device), inference_params=cache)
        return torch.stack([row[length - 1] for row, length in zip(logits, lengths)]).float()


def generate_batch(
    model: LanguageModel,
    prompts: Sequence[bytes],
    count: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    use_cache: bool = True,
) -> Iterator[list[int]]:
    """As `generate` for several prompts of any lengths at once: `count` times the next byte of each."""
    device = model.embedding.device
    generators = [torch.Generator(device).manual_seed(seed) for _ in prompts]
    sequences = [list(prompt or b"\n") for prompt in prompts]
    model.eval()
    cache = model.cache(len(prompts)) if use_cache and prompts else None
    for _ in range(count):
        logits = {}
        if cache is not None:
            kept = [i for i, tokens in enumerate(sequences) if len(tokens) <= model.config.context]
            new = {i: sequences[i][cache.sequences.get(i, 0) :] for i in kept}
            logits = dict(zip(kept, cached_logits(model, cache, new))) if kept else {}
        for i, tokens in enumerate(sequences):  # once the context is full, each byte moves all others to new positions
            after = logits[i] if i in logits else next_logits(model, tokens)
            tokens.append(draw(after, temperature, top_p, generators[i]))
        yield [tokens[-1] for tokens in sequences]


def generate(
    model: LanguageModel,
    prompt: bytes,
    count: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    use_cache: bool = True,
) -> Iterator[int]:
    """`count` bytes that follow `prompt`, each as soon as it is known; the same ones for the same seed and device.

    An empty prompt stands for a new line. temperature: 0 always takes the likeliest byte. top_p: 1 leaves out none. use_cache: keep
    keys and values until the context is full, instead of computing all tokens anew for each byte.
    """
    for (byte,) in generate_batch(model, [prompt], count, temperature, top_p, seed, use_cache):
        yield byte
