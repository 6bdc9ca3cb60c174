"""`overdrive bench`: flags, their checks, and what becomes of the measurements."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from overdrive.bench.attention import attention as measure_attention
from overdrive.bench.gemm import gemm as measure_gemm
from overdrive.bench.host import host as measure_host
from overdrive.bench.kernels import bandwidths
from overdrive.bench.layer import Measure, scaled, scaling
from overdrive.bench.layer import layer as measure_layer
from overdrive.bench.layer import memory as measure_memory
from overdrive.bench.outcome import NothingSelectedError, Outcome
from overdrive.bench.plain import ACTIVATIONS, NORMALIZATIONS, Spec
from overdrive.bench.timing import Protocol
from overdrive.cli import bench_report as report
from overdrive.cli.bench_charts import draw
from overdrive.cli.flags import DTYPES, DtypeName, check_chart, check_folder, choice, count, given, number, parse_device, progress
from overdrive.cli.recipes import DEFAULT_RECIPES, RECIPES, RecipeName

bench = typer.Typer(
    name="bench",
    no_args_is_help=True,
    help="Measure overdrive beside whatever else is installed. All is checked before it is timed; what fails is left out by name.",
)


class PresetName(str, Enum):
    """What `--preset` takes."""

    GPT = "gpt"
    LLAMA = "llama3-8b"
    SMALL = "small"
    TINY = "tiny"


class Axis(str, Enum):
    """What `--scale` takes."""

    TOKENS = "tokens"
    HIDDEN = "hidden"


PRESETS = {
    PresetName.GPT: Spec(4096, 16384, 32, 2048, 4),
    PresetName.LLAMA: Spec(4096, 14336, 32, 8192, 1, groups=8, activation="swiglu", normalization="RMSNorm", bias=False),
    PresetName.SMALL: Spec(512, 2048, 8, 128, 2),
    PresetName.TINY: Spec(256, 1024, 8, 64, 2),
}
# What flags that are not given mean: a size that fills a GPU, and one that a CPU ends within a minute.
ROUNDS = {"cuda": 25, "cpu": 3}
WARMUP = {"cuda": 3, "cpu": 1}
POINTS = {
    ("cuda", Axis.TOKENS): [512, 1024, 2048, 4096, 8192, 16384],
    ("cuda", Axis.HIDDEN): [1024, 2048, 4096, 6144, 8192, 12288],
    ("cpu", Axis.TOKENS): [32, 64, 128],
    ("cpu", Axis.HIDDEN): [64, 128, 256],
}
SHAPES = {
    "cuda": [(8192, 12288, 4096), (8192, 4096, 4096), (8192, 16384, 4096), (8192, 4096, 16384)],
    "cpu": [(256, 512, 256)],
}
TOKENS_HIDDEN_FFN_HEADS = {"cuda": (8192, 4096, 16384, 32), "cpu": (128, 128, 256, 8)}
HEADS_DIM_SEQUENCE_BATCH = {"cuda": (32, 128, 2048, 4), "cpu": (8, 32, 128, 2)}


def refusal(flag: str, message: str) -> typer.BadParameter:
    """The error of a flag."""
    return typer.BadParameter(message, param_hint=f"'{flag}'")


def parse_shape(value: str) -> tuple[int, int, int]:
    """MxNxK."""
    try:
        m, n, k = map(int, value.split("x"))
    except ValueError:
        m = n = k = 0
    if min(m, n, k) < 1 or n % 16 or k % 16:
        raise refusal("--shape", f"{value!r} came; it takes MxNxK, three whole numbers, N and K multiples of 16 for FP8.")
    return m, n, k


Dtype = Annotated[DtypeName, typer.Option(help="Of parameters and activations.")]
Recipes = Annotated[list[RecipeName] | None, typer.Option("--recipe", help="FP8 recipe, repeatable (delayed, current, block).")]
Only = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="What has this in its name, repeatable; a whole name means just that.")
]
Causal = Annotated[bool, typer.Option(help="A token attends only to itself and those before it.")]
Dropout = Annotated[
    float, typer.Option(help="Dropout while timing; errors are taken without.", parser=number(float, 0, 0.99), metavar="FLOAT")
]
Rounds = Annotated[int | None, count("How often everything is timed, in random order (GPU 25, CPU 3).")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N (the GPU where there is one).")]
Seed = Annotated[int, count("Seed of parameters, inputs and order.", low=0)]
Json = Annotated[Path | None, typer.Option("--json", help="Write all of it as JSON.", callback=check_folder)]
Plot = Annotated[Path | None, typer.Option(help="Save a chart as PNG.", callback=check_chart)]


def protocol_of(device: torch.device, rounds: int | None, seed: int) -> Protocol:
    """How a command measures on this device."""
    return Protocol(device, given(rounds, ROUNDS[device.type]), WARMUP[device.type], seed)


def distinct(recipes: Sequence[RecipeName] | None) -> list[str]:
    """The names of the recipes that were asked for, once each."""
    return [name.value for name in dict.fromkeys(recipes or DEFAULT_RECIPES)]


def built(recipes: Sequence[RecipeName] | None) -> list[str]:
    """The same, for kernels: of recipes that have some."""
    for name in recipes or ():
        if name not in DEFAULT_RECIPES:
            raise refusal("--recipe", f"{name.value!r} has no kernels yet; there are those of delayed, current and block.")
    return distinct(recipes)


def spec_of(base: Spec, hidden: int | None, ffn: int | None, heads: int | None, groups: int | None, **others: Any) -> Spec:
    """The preset with what was given in its place; sizes that were not given keep their proportion to the hidden size."""
    width = given(hidden, base.hidden)
    heads = given(heads, max(1, width // base.head_dim))
    if width % heads:
        raise refusal("--heads", f"{heads} heads do not divide the hidden size {width}; it takes a divisor.")
    groups = given(groups, max(1, heads * base.kv_heads // base.heads))
    if heads % groups:
        raise refusal("--groups", f"{groups} groups came for {heads} heads; it takes a divisor of their number.")
    changed = {name: value for name, value in others.items() if value is not None}
    ffn = given(ffn, width * base.ffn // base.hidden)
    spec = dataclasses.replace(base, hidden=width, ffn=ffn, heads=heads, groups=groups, **changed)
    check_multiples(spec, "--ffn" if ffn % 16 else "--hidden")
    return spec


def check_multiples(spec: Spec, flag: str) -> None:
    """Refuse sizes of which FP8 GEMMs could not be made."""
    for name, (k, n) in spec.linears.items():
        if k % 16 or n % 16:
            raise refusal(flag, f"it makes the layer's {name} {k} by {n}; FP8 takes multiples of 16.")


def points_of(spec: Spec, scale: Axis, points: Sequence[int]) -> list[Spec]:
    """The layer at each point."""
    found = []
    for point in dict.fromkeys(points):
        try:
            found.append(scaled(spec, scale.value, point))
        except ValueError as error:
            raise refusal("--point", f"{error}.") from error
        check_multiples(found[-1], "--point")
    return found


def carry_out(
    view: report.View,
    run: Callable[[Protocol], Outcome],
    protocol: Protocol,
    arguments: dict[str, Any],
    json: Path | None,
    plot: Path | None,
) -> None:
    """Measure under a progress bar; print the table and what was left out; save the JSON and the chart."""
    console, device = Console(), protocol.device
    with progress(console) as tick:
        try:
            outcome = run(dataclasses.replace(protocol, tick=tick))
        except NothingSelectedError as error:
            raise refusal("--only", str(error)) from error
    arguments |= {"rounds": protocol.rounds, "seed": protocol.seed, "device": str(device)}
    about = report.about(arguments, device)
    console.print(report.table(view, outcome, about))
    for name, why in outcome.skipped.items():
        console.print(f"Left out {name}: {why}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    for note in report.notes(view, device):
        console.print(note, style="dim", highlight=False)
    if json:
        report.save(outcome, about, json)
        console.print(f"JSON: {json}", soft_wrap=True)
    if not outcome.rows:
        console.print("Nothing could be measured.", style="red")
        raise typer.Exit(1)
    if plot:
        draw(view, outcome, about, plot)
        console.print(f"Chart: {plot}", soft_wrap=True)


def layer_command(name: str, view: report.View, measure: Measure, usual: PresetName, help: str) -> None:
    """Add a command that compares whole layers."""

    @bench.command(name, help=help)
    def command(
        preset: Annotated[PresetName | None, typer.Option(help="Sizes and parts (GPU gpt, for host small; CPU tiny).")] = None,
        hidden: Annotated[int | None, count("Hidden size; ffn, heads and groups go with it unless given.")] = None,
        ffn: Annotated[int | None, count("Hidden size of the MLP.")] = None,
        heads: Annotated[int | None, count("Attention heads.")] = None,
        groups: Annotated[int | None, count("Heads of K and V.")] = None,
        sequence: Annotated[int | None, count("Sequence length.")] = None,
        batch: Annotated[int | None, count("Batch size.")] = None,
        activation: Annotated[
            str | None, typer.Option(help=f"Of the MLP: {', '.join(ACTIVATIONS)}.", parser=choice(*ACTIVATIONS), metavar="NAME")
        ] = None,
        normalization: Annotated[
            str | None, typer.Option(help=f"{' or '.join(NORMALIZATIONS)}.", parser=choice(*NORMALIZATIONS), metavar="NAME")
        ] = None,
        bias: Annotated[bool | None, typer.Option("--bias/--no-bias", help="Biases of the linears.")] = None,
        causal: Causal = True,
        dropout: Dropout = 0.0,
        dtype: Dtype = DtypeName.BF16,
        recipe: Recipes = None,
        only: Only = None,
        scale: Annotated[Axis | None, typer.Option(help="Measure at several sizes.")] = None,
        point: Annotated[list[int] | None, typer.Option(min=1, metavar="INT", help="A size for --scale, repeatable.")] = None,
        rounds: Rounds = None,
        device: Device = None,
        seed: Seed = 0,
        json: Json = None,
        plot: Plot = None,
    ) -> None:
        place = parse_device(device)
        base = PRESETS[given(preset, usual if place.type == "cuda" else PresetName.TINY)]
        parts = {"activation": activation, "normalization": normalization, "bias": bias}
        rest = {"sequence": sequence, "batch": batch, "causal": causal, "dropout": dropout, "dtype": DTYPES[dtype]}
        spec = spec_of(base, hidden, ffn, heads, groups, **parts, **rest)
        if rounds is not None and measure is measure_memory:
            raise refusal("--rounds", f"{rounds} came, but a peak is the same each time; leave it out.")
        if point and not scale:
            raise refusal("--point", f"{point[0]} came without --scale, which takes tokens or hidden.")
        chosen = {name: RECIPES[RecipeName(name)] for name in distinct(recipe)}
        arguments = {**dataclasses.asdict(spec), "recipe": list(chosen), "only": only or []}
        protocol = protocol_of(place, rounds, seed)
        if not scale:
            carry_out(view, lambda p: measure(spec, p, chosen, only or []), protocol, arguments, json, plot)
            return
        specs = points_of(spec, scale, point or POINTS[place.type, scale])
        arguments |= {"scale": scale.value, "point": [getattr(each, scale.value) for each in specs]}
        run = lambda p: scaling(measure, specs, scale.value, p, chosen, only or [])  # noqa: E731
        carry_out(view, run, protocol, arguments, json, plot)


layer_command(
    "layer",
    report.LAYER,
    measure_layer,
    PresetName.GPT,
    "Time one Transformer layer, forward and backward, beside the floor that its bare GEMMs and attention set.",
)
layer_command(
    "memory", report.MEMORY, measure_memory, PresetName.GPT, "Take the peak memory of one Transformer layer, forward and backward."
)
layer_command(
    "host",
    report.HOST,
    measure_host,
    PresetName.SMALL,
    "Time how long the host takes to enqueue a small layer; count its launches and allocations; time it as a CUDA graph.",
)


@bench.command()
def gemm(
    shape: Annotated[
        list[str] | None, typer.Option(metavar="MxNxK", help="Of [M, K] @ [K, N], repeatable (GPU the layer's four).")
    ] = None,
    dtype: Dtype = DtypeName.BF16,
    recipe: Recipes = None,
    rounds: Rounds = None,
    device: Device = None,
    seed: Seed = 0,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Time overdrive's GEMM in high precision and in FP8 beside torch.mm."""
    place, recipes = parse_device(device), built(recipe)
    shapes = [parse_shape(each) for each in shape] if shape else SHAPES[place.type]
    arguments = {"shape": ["x".join(map(str, each)) for each in shapes], "dtype": DTYPES[dtype], "recipe": recipes}
    protocol = protocol_of(place, rounds, seed)
    carry_out(report.GEMM, lambda p: measure_gemm(shapes, DTYPES[dtype], recipes, p), protocol, arguments, json, plot)


@bench.command()
def norm(
    tokens: Annotated[int | None, count("Rows (GPU 8192, CPU 128).")] = None,
    hidden: Annotated[int | None, count("Columns of norms and residuals (GPU 4096, CPU 128).")] = None,
    ffn: Annotated[int | None, count("Columns of activations (GPU 16384, CPU 256).")] = None,
    heads: Annotated[int | None, count("Attention heads (GPU 32, CPU 8).")] = None,
    dtype: Dtype = DtypeName.BF16,
    recipe: Recipes = None,
    only: Only = None,
    rounds: Rounds = None,
    device: Device = None,
    seed: Seed = 0,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Time the memory-bound kernels beside a copy: norms, activations, residuals, the QKV gradient, each with its quantization."""
    place, recipes = parse_device(device), built(recipe)
    sizes = {"tokens": tokens, "hidden": hidden, "ffn": ffn, "heads": heads}
    sizes = {key: given(value, default) for (key, value), default in zip(sizes.items(), TOKENS_HIDDEN_FFN_HEADS[place.type])}
    if sizes["hidden"] % sizes["heads"]:
        raise refusal("--heads", f"{sizes['heads']} heads do not divide the hidden size {sizes['hidden']}; it takes a divisor.")
    if sizes["ffn"] % 2:
        raise refusal("--ffn", f"{sizes['ffn']} came; it takes an even number, of which gated activations take half.")
    arguments = {**sizes, "dtype": DTYPES[dtype], "recipe": recipes, "only": only or []}
    protocol = protocol_of(place, rounds, seed)
    run = lambda p: bandwidths(**sizes, dtype=DTYPES[dtype], recipes=recipes, protocol=p, only=only or [])  # noqa: E731
    carry_out(report.NORM, run, protocol, arguments, json, plot)


@bench.command()
def attention(
    heads: Annotated[int | None, count("Heads of Q (GPU 32, CPU 8).")] = None,
    groups: Annotated[int | None, count("Heads of K and V, as many as of Q unless given.")] = None,
    head_dim: Annotated[int | None, count("Channels of a head (GPU 128, CPU 32).")] = None,
    sequence: Annotated[int | None, count("Sequence length (GPU 2048, CPU 128).")] = None,
    batch: Annotated[int | None, count("Batch size (GPU 4, CPU 2).")] = None,
    causal: Causal = True,
    dropout: Dropout = 0.0,
    dtype: Dtype = DtypeName.BF16,
    only: Only = None,
    rounds: Rounds = None,
    device: Device = None,
    seed: Seed = 0,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Time every attention backend that can run the case, and say which one is chosen."""
    place = parse_device(device)
    asked = (heads, head_dim, sequence, batch)
    heads, head_dim, sequence, batch = (given(*each) for each in zip(asked, HEADS_DIM_SEQUENCE_BATCH[place.type]))
    groups = given(groups, heads)
    if heads % groups:
        raise refusal("--groups", f"{groups} groups came for {heads} heads; it takes a divisor of their number.")
    arguments = {"heads": heads, "groups": groups, "head_dim": head_dim, "sequence": sequence, "batch": batch, "causal": causal}
    arguments |= {"dropout": dropout, "dtype": DTYPES[dtype], "only": only or []}
    width = heads * head_dim
    spec = Spec(width, 4 * width, heads, sequence, batch, groups, causal=causal, dropout=dropout, dtype=DTYPES[dtype])
    protocol = protocol_of(place, rounds, seed)
    carry_out(report.ATTENTION, lambda p: measure_attention(spec, p, only or []), protocol, arguments, json, plot)
