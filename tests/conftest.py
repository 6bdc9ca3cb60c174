"""One suite for CPU and GPU: the `device` fixture, a seed per test, and on a GPU allocations full of NaN."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from overdrive.ops.scaling import arena
from overdrive.scaling.support import is_gemm_epilogue_available

hypothesis.settings.register_profile("local", derandomize=True, deadline=None, max_examples=40)
hypothesis.settings.register_profile("ci", parent=hypothesis.settings.get_profile("local"), max_examples=15)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked gpu runs only where there is one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tests run: the GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def gemm_epilogues(device: str) -> None:
    """Skips on a GPU that does not run ops.gemm_epilogue."""
    if device == "cuda" and not is_gemm_epilogue_available()[0]:
        pytest.skip(is_gemm_epilogue_available()[1])


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Every test starts from a seed of its own name, whatever ran before it."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _no_graphs() -> Iterator[None]:
    """CUDA graphs end with their test, so that delayed scaling's state may grow again."""
    yield
    if torch.cuda.is_available():
        arena(torch.device("cuda", torch.cuda.current_device())).captured = False


def _new_empty(like, *size, dtype=None, device=None, **options):
    """Tensor.new_empty in terms that the compiler can follow from here: it knows what is not patched."""
    options |= {"dtype": like.dtype if dtype is None else dtype, "device": like.device if device is None else device}
    return torch.zeros(*size, **options)


def _poisoning(allocate):
    """`allocate`, with NaN in what it returns on a GPU (kernels allocate their outputs this way, then must write every element)."""

    def poisoned(*args, **kwargs):
        out = allocate(*args, **kwargs)
        if not out.is_cuda or torch.compiler.is_compiling():
            return out
        if out.element_size() == 1:
            out.view(torch.uint8).fill_(0x7F)  # NaN in both FP8 formats
        elif out.is_floating_point():
            out.detach().fill_(torch.nan)
        return out

    return poisoned


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """An output element that a kernel leaves unwritten is NaN."""
    if torch.cuda.is_available():
        for name in ("empty", "empty_like", "empty_strided"):
            monkeypatch.setattr(torch, name, _poisoning(getattr(torch, name)))
        monkeypatch.setattr(torch.Tensor, "new_empty", _poisoning(_new_empty))
