"""GEMMs for Hopper with what follows them in their epilogue, in CuTe: on the GEMM of quack-kernels (Apache-2.0), which comes with
flash-attn-4.

quack brings copies, main loop, tiles and stores; ours are the arithmetic of the epilogues and how they read and record the scales
of delayed scaling. Kernels are compiled for each dtype when first called; a CUDA graph needs a warm-up before it, as it does for
any kernel. The tile is the best of those measured on an H200: two of each multiprocessor's warpgroups take turns, so that one's
epilogue hides behind the other's product; with split accumulation, which takes the registers of two tiles, they share one. quack
has to lie in a folder named site-packages or dist-packages, where pip puts it.
"""

from __future__ import annotations

import hashlib
import math
import pathlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

with warnings.catch_warnings():  # of names that have moved in the package's own dependencies
    warnings.simplefilter("ignore")
    import cutlass
    import cutlass.cute as cute
    from cutlass import Int32
    from quack.compile_utils import make_fake_tensor
    from quack.cute_dsl_utils import mlir_namedtuple, torch2cute_dtype_map
    from quack.epilogue.ops import EpiOp, RowVecLoad, RowVecReduce, Scalar, TileStore
    from quack.epilogue.visit import _EpiModMixinBase
    from quack.gemm_runtime.host import build_gemm_epi_plan, run_gemm_epi_plan
    from quack.gemm_sm90 import GemmSm90

from overdrive.kernels.activation import activated
from overdrive.kernels.launch import MOST_HELD
from overdrive.kernels.tile import column_sums, new_amax
from overdrive.ops.activation import _GELU_CUBIC, _GELU_SCALE
from overdrive.ops.quantize import Mode, Quantization, Quantized, new_quantized
from overdrive.ops.scaling import arena

_SOURCE = hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()
"""Part of the key under which quack keeps compiled kernels on disk."""
_ALIGNMENT = 16  # bytes, of a tensor that TMA reads
_MAGNITUDE = 0x7FFFFFFF  # all bits of an f32 but its sign


# --- the scales of delayed scaling ---------------------------------------------------------------------------------------------


class _Memory(EpiOp):
    """A tensor that the kernel reads or writes by itself."""

    def host_arg_key(self, value):
        return None if value is None else torch2cute_dtype_map[value.dtype]

    def host_fake_arg(self, key, fctx):
        return make_fake_tensor(key, (cute.sym_int(),), leading_dim=0)

    def param_fields(self):
        return [(self.name, object, None)]

    def to_params(self, gemm, args):
        return {self.name: getattr(args, self.name)}


@cute.jit
def _is_first_thread(ctx):
    tile = ctx.tile_coord_mnkl
    return (tile[0] == 0) & (tile[1] == 0) & (ctx.tidx == 0)


class _Slot(_Memory):
    """i32 [1]: which scale is the output's."""

    @cute.jit
    def begin(self, gemm, param, smem_tensor, ctx):
        gemm.slot = param[0]


class _Scale(_Memory):
    """f32 [slots]: all scales, of which the epilogue sees the output's."""

    fn_port = "scalar"

    @cute.jit
    def begin(self, gemm, param, smem_tensor, ctx):
        gemm.scale = param[gemm.slot]
        return gemm.scale


class _Inverse(_Memory):
    """f32 [1]: written, 1 / scale."""

    @cute.jit
    def begin(self, gemm, param, smem_tensor, ctx):
        if _is_first_thread(ctx):
            param[0] = 1.0 / gemm.scale


class _Tenant(Scalar):
    """i32: who records."""

    fn_port = None

    def __init__(self, name: str) -> None:
        super().__init__(name, Int32)

    @cute.jit
    def begin(self, gemm, param, smem_tensor, ctx):
        gemm.tenant = param


class _Owner(_Memory):
    """i32 [slots]: written, who recorded last."""

    @cute.jit
    def begin(self, gemm, param, smem_tensor, ctx):
        if _is_first_thread(ctx):
            param[gemm.slot] = gemm.tenant


class _Amax(_Memory):
    """i32 [slots], the bits of f32: the slot's is raised to the largest magnitude. As integers NaN is larger than all else."""

    fn_port = "sink"

    @cute.jit
    def begin(self, gemm, param, smem_tensor, ctx):
        largest = cute.make_rmem_tensor((1,), Int32)
        largest[0] = 0
        return largest, gemm.slot

    @cute.jit
    def fn_sink_flush(self, gemm, state, frag):
        largest = state[0]
        bits = cute.recast_tensor(frag, Int32)
        for i in cutlass.range(cute.size(bits), unroll_full=True):
            largest[0] = cutlass.max(largest[0], bits[i] & _MAGNITUDE)

    @cute.jit
    def end(self, gemm, param, state, epi_tile, tiled_copy_t2r, tiled_copy_r2s, tile_coord_mnkl, varlen_manager, tidx):
        largest, slot = state
        of_warp = cute.arch.warp_redux_sync(largest[0], "max")
        if cute.arch.lane_idx() == 0:
            cute.arch.atomic_max((param.iterator + slot).llvm_ptr, of_warp, sem="relaxed", scope="gpu")


_DELAYED = (_Slot("slot"), _Scale("scale"), _Inverse("inverse"), _Tenant("tenant"), _Owner("owner"), _Amax("amax"))
"""In the order in which they need each other."""


# --- arithmetic ----------------------------------------------------------------------------------------------------------------

_EXPONENT = -2 * math.log2(math.e) * _GELU_SCALE
_EXPONENT_CUBIC = _GELU_CUBIC * _EXPONENT
_INNER = 2 * _GELU_SCALE
_INNER_CUBIC = 3 * _GELU_CUBIC * _INNER


def _gelu_gate(x):
    """sigmoid(2 z) of the tanh's argument z: the hardware's tanh would lose the relative accuracy of small results."""
    return cute.arch.rcp_approx(1.0 + cute.arch.exp2(x * (_EXPONENT + _EXPONENT_CUBIC * (x * x))))


def _gelu_epilogue(acc, bias=None):
    pre = acc if bias is None else acc + bias
    return {"D": pre, "out": pre * _gelu_gate(pre)}


def _gelu_gradient_epilogue(acc, c):
    gate = _gelu_gate(c)
    gradient = acc * (gate + (gate - gate * gate) * c * (_INNER + _INNER_CUBIC * (c * c)))
    return {"D": gradient, "out": c * gate, "total": gradient}


def _gelu_quantized_epilogue(acc, scale_a, scale_b, scale=None, bias=None):
    result = _gelu_epilogue(acc * (scale_a * scale_b), bias)
    quantized = None if scale is None else result["out"] * scale
    return {"D": result["D"], "data": quantized, "data_t": quantized, "amax": result["out"]}


def _sum_epilogue(acc, scale_a, scale_b, c=None, bias=None):
    out = acc * (scale_a * scale_b)
    out = out if bias is None else out + bias
    return {"D": out if c is None else out + c}


# --- kernels -------------------------------------------------------------------------------------------------------------------


class _Split(_EpiModMixinBase, GemmSm90):
    """quack's GEMM with an epilogue of the ops whose arguments a call gives. Of FP8, sums of 128 products are added in f32.

    It may start before the kernel before it has ended (programmatic dependent launch): an epilogue reads by itself, but not before
    its tile's product, whose operands are copied when that kernel has ended.
    """

    slot: Any = 0  # where there is but one amax

    def epi_to_underlying_arguments(self, args, *, loc=None, ip=None):
        def given(names):
            return tuple(name for name in names if getattr(args, name) is not None)

        kind = type(self)
        operands = dict(kind._epi_mod_operands)
        read = {*given(name for name in operands if name != "c"), *(("c",) if self.c_dtype is not None else ())}
        self._epi_mod_operands = tuple((name, port) for name, port in operands.items() if name in read)
        self._epi_mod_outputs, self._epi_mod_sinks = given(kind._epi_mod_outputs), given(kind._epi_mod_sinks)
        return super().epi_to_underlying_arguments(args, loc=loc, ip=ip)


class _Fast(_Split):
    """FP8 sums stay in the tensor cores, as in cuBLASLt's fast accumulation."""

    def __init__(self, a_dtype: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(a_dtype, *args, **kwargs, fp8_fast_accum=True)


def _kernel(name: str, epilogue: Callable[..., Any], *ops: EpiOp, reads_c: bool = False, base: type = _Fast) -> type:
    """A kernel's class, found again by its name in this module, as quack wants it."""
    fields = [(op.name, op.arg_spec_type()) for op in ops]
    tensor = EpiOp("").arg_spec_type()
    unused = [("split_k_semaphore", tensor), ("split_k_workspace", tensor)]
    arguments: Any = NamedTuple("EpilogueArguments", fields + unused)
    arguments.__new__.__defaults__ = (None,) * len(arguments._fields)
    arguments = mlir_namedtuple(arguments)
    arguments.add_to_output = False
    operands = tuple((op.name, op.fn_port) for op in ops if op.fn_port in ("scalar", "row"))
    body = {
        "_epi_ops": ops,
        "_epi_mod_fn": staticmethod(epilogue),
        "_epi_mod_operands": (("c", "c"), *operands) if reads_c else operands,
        "_epi_mod_outputs": tuple(op.name for op in ops if isinstance(op, TileStore)),
        "_epi_mod_sinks": tuple(op.name for op in ops if op.fn_port == "sink"),
        "_extra_param_fields": tuple((field, kind, None) for field, kind in unused),
        "EpilogueArguments": arguments,
        "__module__": __name__,
        "__qualname__": name,
    }
    return type(name, (base,), body)


_BIAS = RowVecLoad("bias")
_SCALES = (Scalar("scale_a"), Scalar("scale_b"))
_Gelu = _kernel("_Gelu", _gelu_epilogue, _BIAS, TileStore("out"))
_GeluGradient = _kernel("_GeluGradient", _gelu_gradient_epilogue, RowVecReduce("total"), TileStore("out"), reads_c=True)
_FORMS = (TileStore("data"), TileStore("data_t"))
_GeluQuantized = _kernel("_GeluQuantized", _gelu_quantized_epilogue, *_SCALES, *_DELAYED, _BIAS, *_FORMS)
_Sum = _kernel("_Sum", _sum_epilogue, *_SCALES, _BIAS, reads_c=True)
_SplitSum = _kernel("_SplitSum", _sum_epilogue, *_SCALES, _BIAS, reads_c=True, base=_Split)

TILE = (128, 192)
_plans: dict[Any, Any] = {}


def _readable(x: torch.Tensor) -> torch.Tensor:
    """x, no parameter, as matrices that TMA reads: contiguous, or the transpose of what is."""
    x = x.detach()
    if not x.is_contiguous() and not (x.dim() == 2 and x.t().is_contiguous()):
        x = x.contiguous()
    return x.clone() if x.data_ptr() % _ALIGNMENT else x


def _run(
    kernel: type,
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    values: dict[str, Any],
    c: torch.Tensor | None = None,
) -> None:
    """out [M, N] and whatever `values` names, of a [M, K] @ b [N, K].T; c [M, N]: what the epilogue also reads."""
    a, b = _readable(a), _readable(b)
    values = {name: value for name, value in values.items() if value is not None}
    kinds = tuple((name, value.dtype) for name, value in values.items() if isinstance(value, torch.Tensor))
    key = (kernel, a.get_device(), a.dtype, b.dtype, a.is_contiguous(), b.is_contiguous(), out.dtype, c is None, kinds)
    with torch.cuda.device(a.device):
        plan = _plans.get(key)
        if plan is not None:
            run_gemm_epi_plan(plan, a, b, out, c, values)
            return
        with warnings.catch_warnings():  # of its compiler
            warnings.simplefilter("ignore")
            plan = build_gemm_epi_plan(
                kernel, (9, 0), a, b, out, c, epi_values=values, tile_M=TILE[0], tile_N=TILE[1], cluster_M=2, cluster_N=1,
                pingpong=issubclass(kernel, _Fast), post_init_attrs=(("source", _SOURCE),),
            )  # fmt: skip
            run_gemm_epi_plan(plan, a, b, out, c, values)
    if len(_plans) >= MOST_HELD:
        _plans.clear()
    _plans[key] = plan


def _row(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else _readable(bias)[None]


def gemm_activation(x, weight, bias, name):
    """overdrive::gemm_activation."""
    pre, out = (x.new_empty((x.shape[0], weight.shape[0])) for _ in range(2))
    _run(_Gelu, x, weight, pre, {"bias": _row(bias), "out": out})
    return pre, out


def gemm_activation_backward(out, dy, weight, pre, name, bias_grad):
    """overdrive::gemm_activation_backward. A tile's part of pre is read before its part of out is written."""
    rows, cols = pre.shape
    dpre = pre.new_empty((rows, cols))
    partial = pre.new_empty((-(-rows // TILE[0]), cols), dtype=torch.float32) if bias_grad else None
    _run(_GeluGradient, dy, weight.t(), dpre, {"total": partial, "out": out}, _readable(pre))
    if partial is None:
        return dpre, None
    total = pre.new_empty(cols)
    column_sums(partial[None], total)
    return dpre, total


def gemm_activation_quantized(a, b, scale_a, scale_b, bias, pre_dtype, name, *tail):
    """overdrive::gemm_activation_quantized. With current scaling the epilogue takes the amax, and a second kernel quantizes the
    activation with the scale that follows.
    """
    q = Quantization(*tail)
    rows, cols = a.shape[0], b.shape[0]
    pre = a.new_empty((rows, cols), dtype=pre_dtype)
    values = {"scale_a": scale_a, "scale_b": scale_b, "bias": _row(bias)}
    if q.mode == Mode.CURRENT:
        amax = new_amax(pre)
        _run(_GeluQuantized, a, b, pre, {**values, "amax": amax})
        return pre, *activated(pre, name, 0.0, 0.0, q, amax)
    out = new_quantized(a, rows, cols, q)
    _run(_GeluQuantized, a, b, pre, {**values, **_delayed(q, out, a.device)})
    return pre, *out


def gemm_add(a, b, scale_a, scale_b, bias, addend, dtype, fast_accumulation):
    """overdrive::gemm_add."""
    out = a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)
    values = {"scale_a": scale_a, "scale_b": scale_b, "bias": _row(bias)}
    kernel = _Sum if fast_accumulation else _SplitSum
    _run(kernel, a, b, out, values, None if addend is None else _readable(addend))
    return out


def _delayed(q: Quantization, out: Quantized, device: torch.device) -> dict[str, Any]:
    """The arguments of the epilogue that quantizes."""
    assert q.slots is not None
    values = {"slot": q.slots[q.slot : q.slot + 1], "scale": q.scales, "inverse": out.scale_inv, "data": out.data}
    values["data_t"] = None if out.data_t is None else out.data_t.t()
    if q.tenant >= 0:
        state = arena(device)
        values.update(tenant=q.tenant, owner=state.owner, amax=state.amax_bits)
    return values
