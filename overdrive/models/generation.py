"""Text from a model, one byte at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from overdrive.models.language import LanguageModel
from overdrive.scaling.autocast import current_context


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


class Decoder:
    """The logits after each of up to `batch` sequences, from a cache of what came before.

    graphed: on a GPU, a step of one token for each sequence is the replay of a CUDA graph, captured when the second such step
    comes; inside an autocast, whose scales may change from step to step, it is not.
    """

    def __init__(self, model: LanguageModel, batch: int, graphed: bool = True, **options: Any) -> None:
        """options: see InferenceParams."""
        self.model, self.cache, self.graphed = model, model.cache(batch, **options), graphed
        self.graph: torch.cuda.CUDAGraph | None = None
        self._last = torch.zeros(batch, 1, dtype=torch.long, device=self.cache.device)
        self._warm, self._logits = False, torch.empty(0)

    @torch.inference_mode()
    def __call__(self, new: dict[int, list[int]]) -> Tensor:
        """Logits f32 [sequences, 256] of the byte after each sequence; new: its tokens that the cache does not have."""
        lengths = [len(tokens) for tokens in new.values()]
        padded = [tokens + [0] * (max(lengths) - len(tokens)) for tokens in new.values()]
        tokens = torch.tensor(padded, device=self.cache.device)
        self.cache.pre_step(dict(zip(new, lengths)))
        context, _ = current_context()
        if self.graphed and tokens.is_cuda and max(lengths) == 1 and context.rules is None and context.snapshots is None:
            return self._replay(tokens)
        logits = self.model(tokens, inference_params=self.cache)
        return torch.stack([row[length - 1] for row, length in zip(logits, lengths)]).float()

    def _replay(self, tokens: Tensor) -> Tensor:
        count = len(tokens)
        self._last[:count] = tokens  # further rows are padding: their sequences have ended
        if not self._warm:  # kernels are compiled and workspaces made outside of the capture
            self._warm = True
            return self.model(self._last, inference_params=self.cache)[:count, 0].float()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._logits = self.model(self._last, inference_params=self.cache)
        self.graph.replay()
        return self._logits[:count, 0].float()


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
    decoder = Decoder(model, len(prompts)) if use_cache and prompts else None
    for _ in range(count):
        logits = {}
        if decoder is not None:
            kept = [i for i, tokens in enumerate(sequences) if len(tokens) <= model.config.context]
            new = {i: sequences[i][decoder.cache.sequences.get(i, 0) :] for i in kept}
            logits = dict(zip(kept, decoder(new))) if kept else {}
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
