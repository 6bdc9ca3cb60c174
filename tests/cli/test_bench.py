"""`overdrive bench` at tiny sizes: every command, what it refuses, and that what it times is what it says."""

import dataclasses
import importlib.machinery
import json
import math
import os
import statistics
import sys
import time
import types
from datetime import datetime

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import overdrive.pytorch as te
from overdrive.bench import attention, gemm, kernels, layer, observe, timing
from overdrive.bench.competitors import BASELINE, Competitor
from overdrive.bench.outcome import NothingSelectedError, selected
from overdrive.bench.plain import ACTIVATIONS, EagerLayer, Spec
from overdrive.cli.main import app
from overdrive.cli.recipes import RECIPES, RecipeName

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_CPU = DEVICE.type == "cpu"
SPEC = Spec(hidden=64, ffn=128, heads=4, sequence=16, batch=2)
PROTOCOL = timing.Protocol(DEVICE, rounds=2, warmup=1)
LLAMA = dataclasses.replace(SPEC, groups=2, activation="swiglu", normalization="RMSNorm", bias=False)
SIZES = ["--hidden", 64, "--ffn", 128, "--heads", 4, "--sequence", 16, "--batch", 2]
OURS = ["--only", "overdrive", "--only", "overdrive delayed", "--recipe", "delayed"]
LAYER = [*SIZES, *OURS, "--rounds", 2]
NORM = ["--tokens", 48, "--hidden", 32, "--ffn", 64, "--heads", 4, "--rounds", 1]
ATTENTION = ["--heads", 4, "--head-dim", 16, "--sequence", 16, "--batch", 2, "--rounds", 1]
COMMANDS = {
    "layer": LAYER,
    "memory": [*SIZES, *OURS],
    "host": LAYER,
    "gemm": ["--shape", "24x32x16", "--shape", "16x16x48", "--rounds", 1],
    "norm": NORM,
    "attention": ATTENTION,
}


def invoke(*flags: object):
    """Run the command with a terminal wide enough for its longest line."""
    return CliRunner(env={"COLUMNS": "250"}).invoke(app, ["bench", *map(str, flags)])


def saved(tmp_path, *flags: object) -> dict:
    """The JSON of a command that succeeds and saves a chart."""
    found = invoke(*flags, "--json", tmp_path / "out.json", "--plot", tmp_path / "out.png")
    assert found.exit_code == 0, found.output
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "out.json").read_text())
    for row in result["rows"]:
        assert f" {row['variant']} " in found.output
    for why in result["skipped"].values():
        assert why in found.output
    return result


def variants(rows: list[dict]) -> list[str]:
    """The names of the rows."""
    return [row["variant"] for row in rows]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_ends_with_a_table_a_chart_and_json_to_repeat_it_by(command, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["overdrive", "bench", command, "--a flag"])
    result = saved(tmp_path, command, *COMMANDS[command])
    assert result["command"] == f"overdrive bench {command} '--a flag'"
    assert datetime.fromisoformat(result["date"]).tzinfo
    assert result["gpu"] == (torch.cuda.get_device_name() if not ON_CPU else result["gpu"])
    assert result["versions"]["torch"] == torch.__version__
    assert result["versions"]["overdrive"] == te.__version__
    assert result["arguments"]["device"] == DEVICE.type
    assert result["rows"]
    for row in result["rows"]:
        numbers = [value for key, value in row.items() if isinstance(value, float) and "error" not in key and "spread" not in key]
        assert all(0 < number < math.inf for number in numbers), row


def test_the_layer_is_measured_beside_its_floors(tmp_path):
    rows = {row["variant"]: row for row in saved(tmp_path, "layer", *LAYER)["rows"]}
    assert list(rows) == ["eager", "overdrive", "overdrive delayed", "floor", "floor FP8"]
    assert rows["eager"]["ratio"] == 1
    assert rows["overdrive"]["ratio"] == pytest.approx(rows["overdrive"]["ms"] / rows["eager"]["ms"])
    for name in ("floor", "floor FP8"):
        assert rows[name]["ms"] == pytest.approx(rows[name]["gemm_ms"] + rows[name]["attention_ms"])
    for row in rows.values():
        assert row["tflops"] * row["ms"] == pytest.approx(SPEC.flops / 1e9)


@pytest.mark.parametrize("axis", ["tokens", "hidden"])
def test_scaling_measures_each_point(axis, tmp_path):
    points = {"tokens": [8, 32], "hidden": [32, 64]}[axis]
    flags = [part for point in points for part in ("--point", point)]
    result = saved(tmp_path, "layer", *SIZES, "--only", "overdrive", "--rounds", 1, "--scale", axis, *flags)
    measured = [row[axis] for row in result["rows"]]
    assert sorted(set(measured)) == points
    assert result["arguments"]["point"] == points
    assert measured.count(points[0]) == measured.count(points[1]) == 4


def test_scaling_keeps_the_proportions():
    wide = layer.scaled(LLAMA, "hidden", 128)
    assert (wide.hidden, wide.ffn, wide.heads, wide.groups, wide.head_dim) == (128, 256, 8, 4, LLAMA.head_dim)
    assert (wide.sequence, wide.batch) == (LLAMA.sequence, LLAMA.batch)
    few, many = (layer.scaled(LLAMA, "tokens", tokens) for tokens in (8, 64))
    assert (few.sequence, few.batch, many.sequence, many.batch) == (8, 1, 16, 4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_layer_is_the_same_network_for_everyone(activation):
    spec = dataclasses.replace(LLAMA, activation=activation)
    found = layer.memory(spec, PROTOCOL, {"current": RECIPES[RecipeName.CURRENT]}, ["overdrive"])
    assert variants(found.rows) == ["eager", "overdrive"], found.skipped
    found = layer.memory(spec, PROTOCOL, {"current": RECIPES[RecipeName.CURRENT]}, ["overdrive current"])
    assert variants(found.rows) == ["eager", "overdrive current"], found.skipped


def test_dropout_is_timed_and_left_out_of_the_errors(tmp_path):
    rows = saved(tmp_path, "layer", *LAYER, "--dropout", 0.5, "--no-causal", "--dtype", "fp32")["rows"]
    assert {"eager", "overdrive", "overdrive delayed"} <= set(variants(rows))
    assert all(row["error_output"] < 1e-4 for row in rows if row["variant"] in ("eager", "overdrive"))
    eager = EagerLayer(dataclasses.replace(SPEC, dropout=0.5, dtype=torch.float32))
    x = torch.randn(16, 2, 64)
    assert not torch.equal(eager(x), eager(x))
    assert torch.equal(eager.eval()(x), eager(x))


class Counted(nn.Module):
    """The eager layer, its calls counted, with something done to what it returns."""

    def __init__(self, eager: EagerLayer, change) -> None:
        super().__init__()
        self.eager, self.change, self.calls = eager, change, 0

    def forward(self, x):
        self.calls += 1
        return self.change(self.eager(x), self.calls)


def nan_gradient(y, _):
    y.register_hook(lambda dy: dy * math.nan)
    return y


def late_failure(y, calls):
    if calls > 8:
        raise torch.OutOfMemoryError("no room\nfor a long story")
    return y


def test_who_is_wrong_or_fails_is_named_and_left_out(monkeypatch, tmp_path):
    changes = {"liar": lambda y, _: y * 1.5, "nan": nan_gradient, "late": late_failure, "detached": lambda y, _: y.detach()}
    built = {}

    def build(name):
        return lambda eager: built.setdefault(name, Counted(eager, changes[name]))

    def crash(_):
        raise ImportError("libwhatever.so is missing")

    everyone = [
        Competitor(BASELINE, lambda eager: eager),
        *(Competitor(name, build(name)) for name in changes),
        Competitor("crasher", crash),
        Competitor("absent", crash, package="no_such_package"),
    ]
    monkeypatch.setattr(layer, "competitors", lambda *_: everyone)
    result = saved(tmp_path, "layer", *SIZES, "--rounds", 3)
    assert variants(result["rows"]) == ["eager", "floor", "floor FP8"]
    why = result["skipped"]
    assert set(why) == {"liar", "nan", "late", "detached", "crasher", "no_such_package"}
    assert "errors of output and worst gradient are 0.5" in why["liar"]
    assert "nan" in why["nan"]
    assert why["late"] == "OutOfMemoryError: no room"
    assert why["crasher"] == "ImportError: libwhatever.so is missing"
    assert why["no_such_package"] == "not installed"
    assert built["liar"].calls == built["nan"].calls == 3  # checked, and never timed
    assert built["late"].calls > 8


def test_fp8_is_not_forgiven_what_rounding_cannot_do(monkeypatch):
    case = layer.Case(SPEC, PROTOCOL)
    forgetful = Competitor("half", lambda eager: Counted(eager, lambda y, _: y * 0.75), fp8=True)
    entries, skipped = layer.admit(case, [forgetful], PROTOCOL)
    assert not entries
    assert "above 0.2" in skipped["half"]


def test_transformer_engine_is_found_by_its_public_interface(monkeypatch, tmp_path):
    package = types.ModuleType("transformer_engine")
    package.__spec__ = importlib.machinery.ModuleSpec("transformer_engine", None)
    recipes = types.SimpleNamespace(DelayedScaling=lambda amax_history_len: RECIPES[RecipeName.DELAYED])
    for name, module in {"": package, ".pytorch": te, ".common.recipe": recipes, ".common": package}.items():
        monkeypatch.setitem(sys.modules, f"transformer_engine{name}", module)
    rows = saved(tmp_path, "layer", *SIZES, "--only", "TE", "--recipe", "delayed", "--rounds", 1)["rows"]
    assert variants(rows) == ["eager", "TE", "floor", "floor FP8"]
    rows = saved(tmp_path, "memory", *SIZES, "--only", "TE delayed", "--recipe", "delayed")["rows"]
    assert variants(rows) == ["eager", "TE delayed"]


def test_what_compiles_for_long_waits_on_a_cpu_to_be_asked_for(monkeypatch, tmp_path):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module, **_: compiled.append(module) or module)
    flags = [*SIZES, "--device", "cpu", "--recipe", "delayed"]
    result = saved(tmp_path, "memory", *flags)
    assert "--only" in result["skipped"]["torch.compile"]
    assert not compiled
    assert variants(saved(tmp_path, "memory", *flags, "--only", "torch.compile")["rows"]) == ["eager", "torch.compile"]
    assert len(compiled) == 1


@pytest.mark.skipif(not ON_CPU, reason="there is a GPU")
def test_the_host_command_says_what_needs_a_gpu(tmp_path):
    result = saved(tmp_path, "host", *LAYER)
    assert "need a GPU" in result["skipped"]["on this device"]
    assert "launches" not in result["rows"][0]


@pytest.mark.gpu
def test_the_host_command_counts_launches_and_allocations(tmp_path):
    for row in saved(tmp_path, "host", *LAYER)["rows"]:
        assert row["launches"] > 0
        assert row["allocations"] > 0


@pytest.mark.gpu
def test_a_gpu_is_timed_without_the_host_that_keeps_it_waiting():
    def run(_):
        time.sleep(1e-3)
        x.add_(1)

    x = torch.zeros(1000, device=DEVICE)
    alone, with_host = (timing.timed(run, DEVICE, 5, alone=alone) for alone in (True, False))
    alone()  # sees that the host is slower
    assert alone()["ms"] < 0.5 < with_host()["ms"]


@pytest.mark.gpu
def test_counts_of_launches_and_allocations():
    x = torch.randn(1000, device=DEVICE)
    assert observe.launches(lambda: [x + 1, x * 2], DEVICE) == 2
    assert observe.allocations(lambda: [x + 1, x * 2], DEVICE) == 2


def test_a_wrong_kernel_is_not_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "residual_add", lambda x, bias, residual, p, seed: residual)
    result = saved(tmp_path, "norm", *NORM, "--recipe", "current", "--only", "residual")
    assert set(result["skipped"]) == {"residual 32 p 0.0", "residual 32 p 0.1"}
    assert "times what rounding explains" in result["skipped"]["residual 32 p 0.0"]
    names = variants(result["rows"])
    assert names[0] == "copy"
    assert "residual + layernorm 32 p 0.1 current" in names
    assert not set(names) & set(result["skipped"])


def test_a_wrong_transposed_copy_is_not_timed(monkeypatch):
    def flipped(*args):
        data, data_t, *rest = kernels_quantize(*args)
        return data, data_t.view(torch.uint8).flip(1).view(data_t.dtype), *rest

    kernels_quantize = kernels.quantize
    monkeypatch.setattr(kernels, "quantize", flipped)
    found = kernels.bandwidths(48, 32, 64, 4, torch.bfloat16, ["block"], PROTOCOL, ["quantize 32 block 1d"])
    assert variants(found.rows) == ["copy"]
    assert list(found.skipped) == ["quantize 32 block 1d"]


def test_a_kernels_bytes_are_its_tensors(tmp_path):
    rows = {row["variant"]: row for row in saved(tmp_path, "norm", *NORM, "--recipe", "current")["rows"]}
    assert rows["copy"]["bytes"] == 2 * 48 * 64 * 2
    assert rows["quantize 64 current"]["bytes"] == 48 * 64 * (2 + 1 + 1) + 4
    assert rows["gelu backward 64 plain + bias gradient"]["bytes"] == 3 * 48 * 64 * 2 + 64 * 2
    for row in rows.values():
        assert row["TB_s"] == pytest.approx(row["bytes"] / row["us"] / 1e6)
        assert row["of_copy"] == pytest.approx(row["TB_s"] / rows["copy"]["TB_s"])


def test_a_wrong_product_is_not_timed(monkeypatch):
    monkeypatch.setattr(gemm, "product", lambda a, b, *_: torch.zeros(a.shape[0], b.shape[0], device=DEVICE))
    found = gemm.gemm([(24, 32, 16)], torch.bfloat16, ["delayed", "block"], PROTOCOL)
    assert variants(found.rows) == ["torch.mm"]
    assert set(found.skipped) == {f"24x32x16, overdrive{name}" for name in ("", " delayed", " block")}


def test_attention_tells_which_backend_is_chosen_and_why_others_do_not_run(tmp_path, monkeypatch):
    monkeypatch.delenv(attention.VARIABLE, raising=False)
    result = saved(tmp_path, "attention", *ATTENTION, "--groups", 2)
    chosen = [row["variant"] for row in result["rows"] if row["chosen"]]
    q, k = (torch.randn(16, 2, heads, 16, dtype=torch.bfloat16, device=DEVICE) for heads in (4, 2))
    assert chosen == [te.DotProductAttention(4, 16, num_gqa_groups=2).explain(q, k, k).backend]
    skipped = {name.removesuffix(" backward") for name in result["skipped"]}
    assert {*variants(result["rows"]), *skipped} == set(te.attention_backends())
    assert result["skipped"]["flash-attn-4"] == te.DotProductAttention(4, 16, 2).explain(q, k, k).passed_over["flash-attn-4"]
    assert attention.VARIABLE not in os.environ


def test_a_forced_backend_is_forced_only_meanwhile(monkeypatch):
    monkeypatch.setenv(attention.VARIABLE, "math")
    with attention.forced("cudnn"):
        assert os.environ[attention.VARIABLE] == "cudnn"
    assert os.environ[attention.VARIABLE] == "math"


@pytest.mark.parametrize("spec", [SPEC, LLAMA], ids=["gpt", "llama"])
def test_the_floor_does_the_operations_of_the_layer(spec):
    spec = dataclasses.replace(spec, causal=False, dtype=torch.float32)
    eager, x = EagerLayer(spec, DEVICE), torch.randn(16, 2, 64, device=DEVICE, requires_grad=True)
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        y = eager(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()

    def flops(counter, *ops):
        counts = counter.get_flop_counts()["Global"]
        return sum(count for op, count in counts.items() if op in ops)

    gemms = torch.ops.aten.mm, torch.ops.aten.addmm
    assert flops(forward, *gemms) + flops(backward, *gemms) == sum(2 * m * n * k for m, n, k in spec.gemms)
    # plain attention keeps its probabilities; a fused one computes them again, a fifth product
    assert flops(forward, torch.ops.aten.bmm) == spec.attention_flops[0]
    assert flops(backward, torch.ops.aten.bmm) == spec.attention_flops[1] * 4 / 5
    assert dataclasses.replace(spec, causal=True).attention_flops[0] == spec.attention_flops[0] / 2


@pytest.mark.parametrize("fp8", [False, True])
def test_the_floors_gemms_are_those_of_the_layer(fp8, monkeypatch):
    ran = []
    monkeypatch.setattr(layer, "gemm", lambda a, b, *_: ran.append((a.shape[0], b.shape[0], a.shape[1], a.dtype, b.dtype)))
    layer.bare_gemms(LLAMA, DEVICE, fp8)(0)
    assert [each[:3] for each in ran] == LLAMA.gemms
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    wanted = {(e4m3, e4m3), (e5m2, e4m3)} if fp8 else {(torch.bfloat16,) * 2}
    assert {each[3:] for each in ran} == wanted


def test_rounds_are_in_random_order_and_warmup_does_not_count():
    visited, heard = [], []

    def visit(name):
        def run():
            visited.append(name)
            return {"ms": 1000.0 if len(visited) <= 3 * 4 else float(len(visited))}

        return run

    protocol = timing.Protocol(DEVICE, 20, warmup=3, tick=lambda *said: heard.append(said))
    found, failed = timing.measure({name: visit(name) for name in "abcd"}, protocol)
    rounds = [visited[i : i + 4] for i in range(0, len(visited), 4)]
    assert len(rounds) == len(heard) == 23
    assert all(sorted(each) == list("abcd") for each in rounds)
    assert len({tuple(each) for each in rounds}) > 5
    assert not failed
    where = [index + 1 for index, name in enumerate(visited) if name == "a"][3:]
    assert found["a"]["ms"].median == statistics.median(where)
    assert timing.Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == (3, 2, 4)
    assert timing.Spread.of([2.0]).width == 0


def test_inputs_rotate_and_exceed_the_cache(monkeypatch):
    seen, x = [], torch.zeros(1000, device=DEVICE)

    def run(number):
        seen.append(number)
        return x + number

    visit = timing.timed(run, DEVICE, 3)
    for _ in range(2):
        assert visit()["ms"] > 0
    assert seen == list(range(len(seen)))
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(L2_cache_size=60 << 20))
    assert timing.sets_beyond_cache(64 << 20, cuda) == 2
    assert timing.sets_beyond_cache(1 << 20, cuda) == 120
    assert timing.sets_beyond_cache(1, cuda) == timing.MOST_SETS
    case = layer.Case(SPEC, timing.Protocol(torch.device("cpu"), 1))
    case.step(case.eager, 0)
    case.step(case.eager, 1)
    assert not torch.equal(*case.inputs)
    assert not torch.equal(case.inputs[0].grad, case.inputs[1].grad)


def test_peak_memory_counts_what_is_held_at_once():
    def step():
        first = torch.empty(1 << 20, dtype=torch.uint8, device=DEVICE)
        del first
        return [torch.empty(1 << 20, dtype=torch.uint8, device=DEVICE) for _ in range(3)]

    assert observe.peak_memory(step, DEVICE) == 3 << 20


def test_the_worst_error_is_nan_where_there_is_one():
    assert observe.worst([0.1, 0.3, 0.2]) == 0.3
    for errors in ([math.nan, 9.0], [9.0, math.nan], [math.inf, math.nan], [math.nan, math.inf]):
        assert math.isnan(observe.worst(errors))


def test_a_whole_name_selects_just_that():
    names = ["eager", "overdrive", "overdrive delayed"]
    assert selected(names, []) == names
    assert selected(names, ["overdrive"]) == ["overdrive"]
    assert selected(names, ["over", "eager"]) == names
    with pytest.raises(NothingSelectedError, match="'te' is part of no name; there are eager, overdrive"):
        selected(names, ["te"])


@pytest.mark.parametrize(
    ("command", "flag", "value", "allowed"),
    [
        ("layer", "--hidden", "0", "at least 1"),
        ("layer", "--heads", "7", "do not divide the hidden size 64"),
        ("layer", "--groups", "3", "divisor"),
        ("layer", "--ffn", "100", "multiples of 16"),
        ("layer", "--activation", "tanh", "swiglu"),
        ("layer", "--normalization", "BatchNorm", "RMSNorm"),
        ("layer", "--preset", "gpt5", "llama3-8b"),
        ("layer", "--dropout", "1", "from 0 to 0.99"),
        ("layer", "--dtype", "int8", "bf16"),
        ("layer", "--recipe", "fp3", "delayed"),
        ("layer", "--only", "jax", "overdrive delayed"),
        ("layer", "--scale", "depth", "tokens"),
        ("layer", "--point", "64", "--scale"),
        ("layer", "--plot", "bars.pdf", "PNG"),
        ("layer", "--json", "/no/such/folder/out.json", "folder that does not exist"),
        ("layer", "--device", "abacus", "cpu"),
        ("memory", "--rounds", "3", "leave it out"),
        ("host", "--rounds", "none", "at least 1"),
        ("gemm", "--shape", "16x16", "MxNxK"),
        ("gemm", "--shape", "16x20x16", "multiples of 16"),
        ("gemm", "--recipe", "nvfp4", "delayed"),
        ("norm", "--only", "softmax", "rmsnorm"),
        ("norm", "--heads", "5", "divide"),
        ("norm", "--ffn", "63", "even"),
        ("attention", "--groups", "3", "divisor"),
        ("attention", "--only", "flash-attn-5", "cudnn"),
    ],
)
def test_a_bad_flag_is_named_with_what_came_and_what_is_allowed(command, flag, value, allowed):
    found = invoke(command, *COMMANDS[command], flag, value)
    assert found.exit_code == 2, found.output
    for words in (flag, value, allowed):
        assert words in found.output


@pytest.mark.parametrize(
    ("axis", "point", "said"), [("tokens", 24, "multiple"), ("hidden", 44, "proportions"), ("hidden", 40, "40 by 120")]
)
def test_a_point_that_makes_no_layer_is_refused(axis, point, said):
    found = invoke("layer", *SIZES, "--heads", 8, "--scale", axis, "--point", point)
    assert found.exit_code == 2, found.output
    assert "--point" in found.output
    assert said in found.output
