"""Decoding with a Llama of 1B parameters: transformers, eager and compiled, and overdrive, eager, in a CUDA graph and in FP8.

    python benchmarks/generation.py [--json out.json --plot out.png]

Every batch gets a prompt, then as many tokens as asked for, greedily, one at a time; token ids stay on the device. Milliseconds of
the prompt and of a token step, medians of rounds in random order, and tokens a second of all sequences. Weights are random,
of the shape of Llama-3.2-1B unless told otherwise, and the same for all. Before anything is timed, the logits after the prompt and
after further given tokens are compared with a model in float32, whose own bf16 version says what error is allowed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import overdrive.pytorch as te
from overdrive.bench.observe import relative
from overdrive.bench.timing import Protocol as Timing
from overdrive.bench.timing import measure, reason
from overdrive.models import LanguageModel, build
from overdrive.models.hugging_face import load_weights, read_config
from overdrive.recipe import Float8CurrentScaling, Recipe

DTYPE = torch.bfloat16
ALLOWED = {"bf16": 2.0, "FP8": 25.0}
"""Error of a variant's logits, in errors of transformers' bf16. FP8 has some 12; a key that is not attended to makes 4 of bf16's 1,
other logits 60 or more.
"""


class Variant(Protocol):
    """One way to decode: logits [B, V] after a prompt [B, S] of new sequences, then after each token [B, 1] of theirs."""

    def reset(self) -> None: ...
    def prefill(self, tokens: Tensor) -> Tensor: ...
    def step(self, tokens: Tensor) -> Tensor: ...


class Transformers:
    """Its model as it comes, with a cache that grows."""

    def __init__(self, model: Any, batch: int, length: int) -> None:
        self.model = model

    def reset(self) -> None:
        self.cache: Any = transformers.DynamicCache(config=self.model.config)

    def prefill(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    step = prefill


class TransformersCompiled:
    """Its model with a cache of fixed size, the step of one token compiled into a CUDA graph."""

    def __init__(self, model: Any, batch: int, length: int) -> None:
        torch._dynamo.reset()
        self.model, self.cache = model, transformers.StaticCache(config=model.config, max_cache_len=length)
        self.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def reset(self) -> None:
        self.cache.reset()
        self.seen = torch.zeros((), dtype=torch.long, device=self.model.device)

    def _logits(self, forward: Callable[..., Any], tokens: Tensor) -> Tensor:
        positions = self.seen + torch.arange(tokens.shape[1], device=tokens.device)
        self.seen += tokens.shape[1]
        where = {"position_ids": positions[None]}
        if transformers.__version__.startswith("4."):
            where["cache_position"] = positions
        return forward(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **where).logits[:, -1]

    def prefill(self, tokens: Tensor) -> Tensor:
        return self._logits(self.model.forward, tokens)

    def step(self, tokens: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return self._logits(self.forward, tokens)


class Overdrive:
    """The model with InferenceParams; graphed: the step of one token is a CUDA graph; recipe: of the autocast around, if any."""

    def __init__(self, model: LanguageModel, batch: int, length: int, graphed: bool = False, recipe: Recipe | None = None) -> None:
        self.model, self.recipe, self.cache = model, recipe, model.cache(batch)
        self.one_each = dict.fromkeys(range(batch), 1)
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=model.embedding.device)
        self.graph = torch.cuda.CUDAGraph() if graphed else None
        self.logits, self.warm = torch.empty(0), False

    def reset(self) -> None:
        self.cache.reset()

    def _forward(self, tokens: Tensor) -> Tensor:
        with contextlib.nullcontext() if self.recipe is None else te.autocast(recipe=self.recipe):
            return self.model(tokens, inference_params=self.cache, last_only=True)

    def prefill(self, tokens: Tensor) -> Tensor:
        self.cache.pre_step(dict.fromkeys(range(len(tokens)), tokens.shape[1]))
        return self._forward(tokens)

    def step(self, tokens: Tensor) -> Tensor:
        self.cache.pre_step(self.one_each)
        if self.graph is None or not self.warm:  # kernels are compiled outside of the capture
            self.warm = True
            return self._forward(tokens)
        self.tokens.copy_(tokens)
        if not len(self.logits):
            with torch.cuda.graph(self.graph):
                self.logits = self._forward(self.tokens)
        self.graph.replay()
        return self.logits


def random_llama(a: argparse.Namespace, device: torch.device) -> Any:
    """A LlamaForCausalLM whose attention counts for as much as its MLPs, and whose layers for more than its embedding."""
    config = transformers.LlamaConfig(
        hidden_size=a.hidden,
        intermediate_size=a.ffn,
        num_hidden_layers=a.layers,
        num_attention_heads=a.heads,
        num_key_value_heads=a.groups,
        vocab_size=a.vocabulary,
        max_position_embeddings=a.context,
        rope_theta=500000.0,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data.normal_(0, weight.shape[1] ** -0.5)
        else:
            weight.data.add_(torch.randn_like(weight), alpha=0.1)
    return model.eval().requires_grad_(False)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of memory behind a model's parameters, each counted once."""
    storages = {}

    def visit(tensor: Any) -> None:
        if is_traceable_wrapper_subclass(tensor):
            for name in tensor.__tensor_flatten__()[0]:
                visit(getattr(tensor, name))
        else:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()

    for parameter in model.parameters():
        visit(parameter)
    return sum(storages.values())


def teacher_forced(variant: Variant, tokens: Tensor, prompt: int) -> Tensor:
    """Logits [B, n, V] after the first `prompt` of `tokens` and after each one that follows."""
    variant.reset()
    logits = [variant.prefill(tokens[:, :prompt]).clone()]
    logits += [variant.step(tokens[:, i : i + 1]).clone() for i in range(prompt, tokens.shape[1])]
    return torch.stack(logits, 1)


class Check:
    """Logits in float32 after a prompt and after each of `steps` tokens that transformers chooses."""

    def __init__(self, theirs: Any, exact: Any, prompt: Tensor, steps: int) -> None:
        eager, self.prompt, tokens = Transformers(theirs, len(prompt), 0), prompt.shape[1], [prompt]
        eager.reset()
        logits = eager.prefill(prompt)
        for _ in range(steps):
            tokens.append(logits.argmax(-1, keepdim=True))
            logits = eager.step(tokens[-1])
        self.tokens = torch.cat(tokens, 1)
        # of a few sequences at a time, as float32 takes room
        self.exact = torch.cat([exact(few, logits_to_keep=steps + 1).logits for few in self.tokens.split(8)])
        logits = teacher_forced(eager, self.tokens, self.prompt)
        self.allowed, self.choice = relative(logits, self.exact), logits.argmax(-1)

    def __call__(self, variant: Variant, precision: str) -> dict[str, float]:
        """Relative error of logits after the prompt and after all, and how often the likeliest token is transformers'."""
        logits = teacher_forced(variant, self.tokens, self.prompt)
        first, error = relative(logits[:, 0], self.exact[:, 0]), relative(logits, self.exact)
        most = ALLOWED[precision] * self.allowed
        if not max(first, error) < most:
            raise AssertionError(f"logits are off by {first:.1e} after the prompt, {error:.1e} after all; {most:.1e} is allowed")
        return {"first": first, "all": error, "same_choice": (logits.argmax(-1) == self.choice).float().mean().item()}


class Clock:
    """Milliseconds between marks, of the GPU where there is one."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu, self.marks = device.type == "cuda", []

    def mark(self) -> None:
        if self.on_gpu:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def intervals(self) -> list[float]:
        if not self.on_gpu:
            return [(end - start) * 1e3 for start, end in zip(self.marks, self.marks[1:])]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in zip(self.marks, self.marks[1:])]


def generate(variant: Variant, prompt: Tensor, count: int) -> dict[str, float]:
    """Time of the prompt, median time of a step, and tokens a second of all `count` steps."""
    variant.reset()
    clock = Clock(prompt.device)
    if prompt.is_cuda:
        torch.cuda.synchronize()
    clock.mark()
    tokens = variant.prefill(prompt).argmax(-1, keepdim=True)
    clock.mark()
    for _ in range(count):
        tokens = variant.step(tokens).argmax(-1, keepdim=True)
        clock.mark()
    prefill, *steps = clock.intervals()
    return {
        "prefill_ms": prefill,
        "step_ms": statistics.median(steps),
        "tokens_per_second": 1e3 * len(prompt) * count / sum(steps),
    }


def quantized(theirs: Any, device: torch.device, recipe: Recipe) -> LanguageModel:
    """The model here with FP8 weights."""
    with te.quantized_model_init(recipe=recipe):
        model = build(read_config(theirs.config), device, DTYPE).eval()
    plain = build(read_config(theirs.config), device, DTYPE)
    load_weights(plain, theirs.state_dict())
    model.load_state_dict(plain.state_dict())
    return model


def variants(theirs: Any, device: torch.device) -> tuple[dict[str, tuple[str, Callable[[int, int], Variant]]], dict[str, int]]:
    """(precision and maker of each variant, bytes of each model's weights)."""
    ours = build(read_config(theirs.config), device, DTYPE).eval()
    load_weights(ours, theirs.state_dict())
    recipe = Float8CurrentScaling()
    found: dict[str, tuple[str, Callable[[int, int], Variant]]] = {
        "transformers eager": ("bf16", partial(Transformers, theirs)),
        "transformers compiled": ("bf16", partial(TransformersCompiled, theirs)),
        "overdrive eager": ("bf16", partial(Overdrive, ours)),
        "overdrive graph": ("bf16", partial(Overdrive, ours, graphed=True)),
    }
    memory = {"bf16": weight_bytes(ours)}
    try:
        eighth = quantized(theirs, device, recipe)
    except Exception as error:  # a machine without FP8
        print(f"overdrive FP8 weights: {reason(error)}")
    else:
        memory["FP8"] = weight_bytes(eighth)
        found["overdrive FP8 eager"] = "FP8", partial(Overdrive, eighth, recipe=recipe)
        found["overdrive FP8 graph"] = "FP8", partial(Overdrive, eighth, graphed=True, recipe=recipe)
    return found, memory


def row_of(
    batch: int,
    makers: dict[str, tuple[str, Callable[[int, int], Variant]]],
    theirs: Any,
    exact: Any,
    a: argparse.Namespace,
    late: Callable[[], bool],
) -> dict[str, Any]:
    """What is seen with one size of batch: errors, times, and why variants were left out."""
    device = theirs.device
    prompt = torch.randint(a.vocabulary, (batch, a.prompt), device=device)
    check = Check(theirs, exact, prompt, a.checked)
    row: dict[str, Any] = {"batch": batch, "allowed": check.allowed, "errors": {}, "failed": {}}
    ready = {}
    for name, (precision, make) in makers.items():
        if "compiled" in name and late():
            row["failed"][name] = f"{a.seconds} seconds have passed"
            continue
        try:
            began = time.perf_counter()
            variant = make(batch, a.context)
            row["errors"][name] = check(variant, precision)
            ready[name] = partial(generate, variant, prompt, a.tokens)
        except Exception as error:  # the others go on
            row["failed"][name] = reason(error)
            continue
        errors = "error {first:.1e} after the prompt, {all:.1e} after all, same choice {same_choice:.0%}"
        took = f"ready after {time.perf_counter() - began:.0f} s"
        print(f"batch {batch}, {name}: {errors.format(**row['errors'][name])}, {took}", flush=True)
    timed, failed = measure(ready, Timing(device, a.rounds, warmup=1))
    row["failed"] |= failed
    row["times"] = {name: {what: spread._asdict() for what, spread in found.items()} for name, found in timed.items()}
    for name, found in timed.items():
        step = found["step_ms"]
        print(
            f"batch {batch}, {name}: prompt {found['prefill_ms'].median:.2f} ms, step {step.median:.3f} ms "
            f"[{step.low:.3f}, {step.high:.3f}], {found['tokens_per_second'].median:.0f} tokens/s",
            flush=True,
        )
    for name, why in row["failed"].items():
        print(f"batch {batch}, {name} left out: {why}", flush=True)
    return row


def plot(path: str, rows: list[dict[str, Any]], title: str) -> None:
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    figure, axes = plt.subplots(1, 2, figsize=(13, 5))
    names = list(dict.fromkeys(name for row in rows for name in row["times"]))
    for index, name in enumerate(names):
        seen = [row for row in rows if name in row["times"]]
        style = "s--" if name.startswith("transformers") else "o-"
        for axis, what in zip(axes, ("step_ms", "tokens_per_second")):
            values = [row["times"][name][what]["median"] for row in seen]
            axis.plot([row["batch"] for row in seen], values, style, color=f"C{index}", label=name)
    batches = [row["batch"] for row in rows]
    for axis, label in zip(axes, ("milliseconds a step", "tokens a second, all sequences")):
        axis.set(xscale="log", xlabel="sequences", ylabel=label)
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0)
    axes[1].set_yscale("log")
    axes[1].legend(loc="lower right")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 2048, "layers": 16, "heads": 32, "groups": 8, "ffn": 8192, "vocabulary": 128256}
    lengths = {"context": 1024, "prompt": 128, "tokens": 64}
    for name, default in {**sizes, **lengths}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--checked", type=int, default=6, help="steps whose logits are checked")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="variants with one of these in their names")
    parser.add_argument("--seconds", type=float, default=90, help="after so many nothing more is compiled")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json")
    parser.add_argument("--plot")
    a = parser.parse_args()
    if a.prompt + max(a.tokens, a.checked) > a.context:
        parser.error(f"--context {a.context} holds no prompt of {a.prompt} and {max(a.tokens, a.checked)} tokens after it")
    return a


def main() -> None:
    a, began = parsed(), time.perf_counter()
    warnings.filterwarnings("ignore", ".*FP8 GEMMs need token counts")  # a step has few
    device = torch.device(a.device)
    torch.manual_seed(0)
    with torch.no_grad():
        theirs = random_llama(a, device)
        makers, memory = variants(theirs, device)
        print("weights: " + ", ".join(f"{name} {size / 2**30:.3f} GiB" for name, size in memory.items()), flush=True)
        if a.only:
            makers = {name: maker for name, maker in makers.items() if any(word in name for word in a.only)}
        exact = copy.deepcopy(theirs).float()
        rows = [row_of(batch, makers, theirs, exact, a, lambda: time.perf_counter() - began > a.seconds) for batch in a.batches]
    if a.json:
        about = {
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.date.today().isoformat(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            **{package: metadata.version(package) for package in ("torch", "triton", "transformers")},
            "overdrive": te.__version__,
            "arguments": {name: value for name, value in vars(a).items() if name not in ("json", "plot")},
            "seconds": time.perf_counter() - began,
        }
        with open(a.json, "w") as file:
            json.dump({**about, "weight_bytes": memory, "rows": rows}, file, indent=1)
    if a.plot:
        plot(a.plot, rows, f"Greedy decoding, {a.layers} layers of {a.hidden}, prompt {a.prompt}, cache {a.context}, {device.type}")


if __name__ == "__main__":
    main()
