"""What this machine has and what of overdrive is usable on it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any

import torch

import overdrive.pytorch as te
from overdrive.cli.recipes import RECIPES
from overdrive.scaling.support import is_gemm_epilogue_available, is_norm_cluster_available, usable

# Variables that change what runs, and so belong in a bug report where they are set.
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_LOGS", "TRITON_INTERPRET")


def examine() -> dict[str, Any]:
    """Versions, devices, environment, recipes, attention backends and optional kernels, in values that JSON can hold."""
    return {
        "versions": versions(),
        "devices": devices(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "recipes": {name.value: answer(*usable(recipe)) for name, recipe in RECIPES.items()},
        "attention backends": {name: answer(*found) for name, found in te.attention_backends().items()},
        "optional kernels": {
            "epilogues of large GEMMs": answer(*is_gemm_epilogue_available()),
            "norms of delayed scaling in one launch": answer(*is_norm_cluster_available()),
        },
    }


def answer(able: bool, reason: str) -> dict[str, Any]:
    """A (usable, reason) pair by its names."""
    return {"usable": able, "reason": reason}


def versions() -> dict[str, str]:
    """Versions of everything that a bug may hang on."""
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {
        "overdrive": te.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "flash-attn-4": installed("flash-attn-4"),
        "quack-kernels": installed("quack-kernels"),
        "nvidia-cutlass-dsl": installed("nvidia-cutlass-dsl"),
        "CUDA (torch's)": torch.version.cuda or "none",
        "cuDNN": str(cudnn or "none"),
        "driver": driver(),
    }


def installed(package: str) -> str:
    """Version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def driver() -> str:
    """Version of the NVIDIA driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "none"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"
    return said[0] if said else "unknown"


def devices() -> list[str]:
    """The CPU and each GPU in a line."""
    found = [f"cpu: {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        memory = f"{p.total_memory / 2**30:.0f} GiB"
        found.append(f"cuda:{index}: {p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} SMs, {memory}")
    return found


def to_markdown(found: dict[str, Any]) -> str:
    """The findings as Markdown lists, one heading a section."""
    lines = ["# overdrive doctor"]
    for heading, section in found.items():
        if not section:
            continue
        lines += ["", f"## {heading.capitalize()}"]
        if isinstance(section, list):
            lines += [f"- {item}" for item in section]
        else:
            lines += [f"- {name}: {sentence(value)}" for name, value in section.items()]
    return "\n".join(lines)


def sentence(value: str | dict[str, Any]) -> str:
    """A version as it is; an answer as yes or no and why."""
    if isinstance(value, str):
        return value
    said = "yes" if value["usable"] else "no"
    return f"{said} ({value['reason']})" if value["reason"] else said
