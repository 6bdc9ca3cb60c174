"""What computes attention: one table of borrowed backends, the choice between them, and that choice explained."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from overdrive.ops.library import constant_result

VARIABLE = "OVERDRIVE_ATTENTION"
_HALF = (torch.float16, torch.bfloat16)
_ALL = (*_HALF, torch.float32, torch.float64)
_BIASES = ("none", "constant", "gradient", "gradient alone")
_PACKED = ("bottom-right", "top-left")


class Case(NamedTuple):
    """What the choice of a backend depends on.

    mask: "none", "causal" or "tensor". dropout: "none", "sixteenths" (a multiple of 1/16) or "any". size: "small" where the
    host is what one waits for, else "large". bias: "none", "constant", "gradient", or "gradient alone" if Q, K and V get none;
    wide_bias: it is of another dtype than Q. offset, max_logit: as in Scores. packed: "" of a batch; of packed sequences
    "bottom-right" or, if the mask has a diagonal through the first query and key of sequences whose queries and keys differ in
    number, "top-left"; their mask is "tensor", which it is of the padded ones.
    """

    device: str
    dtype: torch.dtype
    mask: str
    dropout: str
    head_dim: int
    value_dim: int
    grouped: bool
    size: str
    bias: str = "none"
    wide_bias: bool = False
    offset: bool = False
    max_logit: bool = False
    packed: str = ""


class Backend(NamedTuple):
    """What a backend can do. coarse_dropout: compute capabilities on which it rounds the probability to sixteenths.

    sdpa: which of torch's it is. package: what must be installed for it; module: what must load. heavy: it takes more host time
    than others. wide_biases: whether it takes biases of another dtype than Q. offset, max_logit: whether it takes and gives what
    Scores says. packed: of which packed sequences it takes as they lie (Case.packed), all others padded; padded: whether it takes a
    batch. on_request: it runs only where it is forced.
    """

    name: str
    sdpa: SDPBackend | None
    devices: tuple[str, ...]
    capabilities: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (*_HALF, torch.float32)
    masks: tuple[str, ...] = ("none", "causal", "tensor")
    dropout: bool = True
    coarse_dropout: tuple[int, ...] = ()
    head_dim_multiple: int = 1
    max_head_dim: int | None = None
    unequal_dims: bool = True
    grouped: bool = True
    heavy: bool = False
    package: str | None = None
    module: str | None = None
    biases: tuple[str, ...] = ("none",)
    wide_biases: bool = True
    offset: bool = False
    max_logit: bool = False
    packed: tuple[str, ...] = ()
    padded: bool = True
    on_request: bool = False


BACKENDS = (
    Backend(
        "flash-attn-4",
        None,
        ("cuda",),
        capabilities=(9,),
        dtypes=_HALF,
        masks=("none", "causal"),
        dropout=False,
        unequal_dims=False,
        head_dim_multiple=32,  # with others dQ is wrong (Dao-AILab/flash-attention#2896)
        max_head_dim=256,
        heavy=True,
        package="flash_attn.cute",
        module="overdrive.kernels.attention",
    ),
    Backend(
        "flash-varlen",
        None,
        ("cuda",),
        capabilities=(8, 9, 10, 12),
        dtypes=_HALF,
        dropout=False,
        unequal_dims=False,
        head_dim_multiple=8,
        max_head_dim=256,
        module="overdrive.functional.flash_varlen",
        packed=("bottom-right",),
        padded=False,
    ),
    Backend("cudnn", SDPBackend.CUDNN_ATTENTION, ("cuda",), (9, 10), _HALF, coarse_dropout=(10,), max_head_dim=256),
    Backend(
        "flash",
        SDPBackend.FLASH_ATTENTION,
        ("cuda",),
        capabilities=(8, 9, 10, 12),
        dtypes=_HALF,
        masks=("none", "causal"),
        max_head_dim=256,
        unequal_dims=False,
    ),
    Backend(
        "efficient",
        SDPBackend.EFFICIENT_ATTENTION,
        ("cuda",),
        grouped=False,
        biases=(
            "none",
            "constant",
            "gradient",
        ),  # alone, a bias is not given the statistics to make it from (pytorch/pytorch#148476)
        wide_biases=False,
    ),
    Backend(
        "cpu",
        SDPBackend.FLASH_ATTENTION,
        ("cpu",),
        dtypes=_ALL,
        dropout=False,
        unequal_dims=False,
        biases=("none", "constant"),
    ),
    Backend("math", SDPBackend.MATH, ("cuda", "cpu"), dtypes=_ALL, biases=_BIASES),
    Backend("reference", None, ("cuda", "cpu"), dtypes=_ALL, biases=_BIASES, offset=True, max_logit=True),
    Backend("flex", None, ("cuda",), dropout=False, biases=_BIASES, offset=True, packed=_PACKED, on_request=True),
)
"""Fastest first, as measured on an H200 in bf16. Torch has the last word on lengths and strides; the reference takes all."""

BY_NAME = {backend.name: backend for backend in BACKENDS}
SDPA = {backend.name: backend.sdpa for backend in BACKENDS if backend.sdpa is not None}


@functools.cache
def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


@functools.cache
def _machine_refusal(backend: Backend, device: str) -> str:
    """Why `backend` cannot run on this machine's `device`, or ""."""
    if device not in backend.devices:
        return f"runs on {' and '.join(backend.devices)} only, not on {device}"
    if device == "cuda" and not torch.cuda.is_available():
        return "needs a CUDA GPU, torch sees none"
    if backend.capabilities and _capability()[0] not in backend.capabilities:
        major, minor = _capability()
        return f"needs compute capability {', '.join(f'{c}.x' for c in backend.capabilities)}, this GPU has {major}.{minor}"
    if backend.package:
        package = backend.package.split(".")[0]
        if importlib.util.find_spec(package) is None or importlib.util.find_spec(backend.package) is None:
            return f"{backend.package} is not installed: pip install 'overdrive[fa4]'"
    return ""


@functools.cache
def _load_failure(module: str) -> str:
    """Why `module` cannot be used, or ""."""
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a compiler package may raise where its libraries do not fit
        return f"does not load: {type(error).__name__}: {error}"
    return ""


def _refusal(backend: Backend, case: Case) -> str:
    """Why `backend` cannot take `case`, or ""; lengths and strides are torch's to judge."""
    dims = (case.head_dim, case.value_dim)
    if reason := _machine_refusal(backend, case.device):
        return reason
    if not backend.padded and not case.packed:
        return "takes packed sequences only"
    if case.dtype not in backend.dtypes:
        return f"takes {', '.join(map(str, backend.dtypes))}, not {case.dtype}"
    if case.mask not in backend.masks:
        return "takes no mask tensor"
    if case.bias not in backend.biases:
        if len(backend.biases) == 1:
            return "takes no bias"
        return "gives no gradient for the bias" + (" alone" if "gradient" in backend.biases else "")
    if case.wide_bias and not backend.wide_biases:
        return f"takes a bias only in the dtype of Q, {case.dtype}"
    if case.offset and not backend.offset:
        return "has the vanilla softmax only"
    if case.max_logit and not backend.max_logit:
        return "does not give the largest logit"
    if not backend.padded and case.packed not in backend.packed:
        return "has the diagonal of a mask end with the last query and key of each sequence only"
    if case.dropout != "none" and not backend.dropout:
        return "has no dropout"
    if case.dropout == "any" and backend.coarse_dropout and _capability()[0] in backend.coarse_dropout:
        return "rounds dropout probabilities to sixteenths on this GPU"
    if not backend.unequal_dims and dims[0] != dims[1]:
        return f"needs head dims of Q/K and V to be equal, got {dims[0]} and {dims[1]}"
    if any(dim % backend.head_dim_multiple for dim in dims):
        return f"takes head dims that are multiples of {backend.head_dim_multiple}, got {dims[0]} and {dims[1]}"
    if backend.max_head_dim and max(dims) > backend.max_head_dim:
        return f"takes head dims up to {backend.max_head_dim}, not {max(dims)}"
    return _load_failure(backend.module) if backend.module else ""


class Route(NamedTuple):
    """Backends for a case, best first: those of torch's, which has the last word, or one.

    repeat: the best takes no groups, so K and V heads are repeated for it.
    """

    names: tuple[str, ...]
    repeat: bool = False


def cannot_run(name: str, reason: str) -> ValueError:
    return ValueError(f"{VARIABLE}={name} cannot run this attention: {reason}; unset it to let overdrive choose")


@functools.cache
def _chosen(forced: str, case: Case) -> Route:
    if forced:
        if forced not in BY_NAME:
            raise ValueError(f"{VARIABLE} must be one of {', '.join(BY_NAME)}, got {forced!r}; unset it to let overdrive choose")
        if reason := _refusal(BY_NAME[forced], case):
            raise cannot_run(forced, reason)
        names = (forced,)
    else:
        fitting = (backend for backend in BACKENDS if not backend.on_request and (case.size == "large" or not backend.heavy))
        names = tuple(backend.name for backend in fitting if not _refusal(backend, case))
        names = tuple(name for name in names if name in SDPA) if names[0] in SDPA else names[:1]
    return Route(names, case.grouped and not BY_NAME[names[0]].grouped)


@constant_result
def route(*case) -> tuple[tuple[str, ...], bool]:
    """The Route of a Case; the forced backend alone if there is one."""
    route = _chosen(os.environ.get(VARIABLE, ""), Case(*case))
    return route.names, route.repeat


class Decision(NamedTuple):
    """Which backend runs, and why each other one does not."""

    backend: str
    passed_over: dict[str, str]

    def __str__(self) -> str:
        lines = [f"attention runs on {self.backend}"]
        return "\n".join(lines + [f"  not {name}: {reason}" for name, reason in self.passed_over.items()])


_TORCH_CALLS_IT = {
    SDPBackend.CUDNN_ATTENTION: ("cuDNN attention", torch.backends.cuda.can_use_cudnn_attention),
    SDPBackend.FLASH_ATTENTION: ("Flash attention", torch.backends.cuda.can_use_flash_attention),
    SDPBackend.EFFICIENT_ATTENTION: ("Memory efficient", torch.backends.cuda.can_use_efficient_attention),
}


def torch_refusal(backend: Backend, query, key, value, mask, causal, dropout) -> str:
    """Why torch would not run `backend` on these very tensors, or ""."""
    if not query.is_cuda or backend.sdpa not in _TORCH_CALLS_IT:
        return ""
    title, usable = _TORCH_CALLS_IT[backend.sdpa]
    grouped = query.shape[1] != key.shape[1]
    if usable(torch.backends.cuda.SDPAParams(query, key, value, mask, dropout, causal, grouped)):
        return ""
    # asked for the impossible, torch warns of each backend's reasons under a heading, then raises
    with warnings.catch_warnings(record=True) as caught, sdpa_kernel(backend.sdpa), contextlib.suppress(RuntimeError):
        warnings.simplefilter("always")
        F.scaled_dot_product_attention(query, key, value, mask, dropout, causal, enable_gqa=grouped)
    reasons, heading = [], ""
    for message in (str(warning.message).split(" (Triggered", 1)[0] for warning in caught):
        if "kernel not used because" in message:
            heading = message
        elif heading.startswith(title):
            reasons.append(message)
    return " ".join(reasons) or "torch refuses it"


def decide(case: Case, query, key, value, mask, causal, dropout) -> Decision:
    """The Decision on `case`, which is of these tensors, as torch is to read them."""
    forced = os.environ.get(VARIABLE, "")
    chosen, passed_over = "", {}
    for backend in BACKENDS:
        reason = _refusal(backend, case) or torch_refusal(backend, query, key, value, mask, causal, dropout)
        if forced:
            reason = reason or (f"{VARIABLE}={forced}" if backend.name != forced else "")
        elif backend.on_request:
            reason = reason or f"runs only where {VARIABLE} forces it"
        elif chosen:
            reason = reason or f"{chosen} is faster"
        elif backend.heavy and case.size == "small":
            reason = reason or "takes more host time than it saves with so little work"
        if reason:
            passed_over[backend.name] = reason
        else:
            chosen = backend.name
    return Decision(chosen, passed_over)


def attention_backends() -> dict[str, tuple[bool, str]]:
    """Each backend's (usable, reason) on this machine, on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reasons = {
        backend.name: _machine_refusal(backend, device) or (_load_failure(backend.module) if backend.module else "")
        for backend in BACKENDS
    }
    return {name: (not reason, reason) for name, reason in reasons.items()}
