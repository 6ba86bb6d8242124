# SPDX-License-Identifier: BSD-3-Clause
"""What a bug report needs to know: ``python -m masked_loss.info``."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import torch

import masked_loss
from masked_loss._op.library import LIBRARY

# What a report says of the environment besides MASKED_LOSS_*; docs/environment.md has them all.
VARIABLES = ("ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def info() -> dict[str, str]:
    """Versions, the CPU kernels in use, the CUDA kernels, devices and the environment.

    Example:
        >>> import masked_loss.info
        >>> masked_loss.info.info()["masked_loss"] == masked_loss.__version__
        True
    """
    capability = torch.ops.masked_loss.cpu_capability()
    return {
        "masked_loss": masked_loss.__version__,
        "library": str(LIBRARY),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu kernels": f"{capability} ({_vectors(capability)})",
        "threads": str(torch.get_num_threads()),
        "cuda kernels": _cuda_kernels(torch.ops.masked_loss.cuda_architectures()),
        "cuda of torch": torch.version.cuda or "none",
        "cuda devices": _devices(),
        "driver": _driver(),
        "environment": _environment(),
    }


def _vectors(capability: str) -> str:
    if capability != "default":
        return {"avx2": "256 bits", "avx512": "512 bits"}[capability]
    names = {"x86_64": "SSE2", "AMD64": "SSE2", "aarch64": "NEON", "arm64": "NEON"}
    return f"{names.get(platform.machine(), platform.machine())}, 128 bits"


def _cuda_kernels(architectures: str) -> str:
    """From nvcc's "800,900" to "sm_80 sm_90"."""
    found = [f"sm_{int(number) // 10}" for number in architectures.split(",") if number]
    return " ".join(found) or "none"


def _devices() -> str:
    if not torch.cuda.is_available():
        return "none"
    names = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        names.append(f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})")
    return ", ".join(names)


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "none found"
    versions = sorted(set(result.stdout.split())) if result.returncode == 0 else []
    return ", ".join(versions) or "none found"


def _environment() -> str:
    names = [name for name in os.environ if name.startswith("MASKED_LOSS_")]
    names += [name for name in VARIABLES if name in os.environ]
    return " ".join(f"{name}={os.environ[name]}" for name in sorted(names)) or "nothing set"


def main() -> None:
    entries = info()
    width = max(map(len, entries))
    sys.stdout.writelines(f"{name:<{width}}  {value}\n" for name, value in entries.items())


if __name__ == "__main__":
    main()
