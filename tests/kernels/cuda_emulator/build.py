# SPDX-License-Identifier: BSD-3-Clause
"""Builds csrc/kernels/cuda/*.cu for the emulator, as C++, and the operators around them.

Objects are kept in build/emulator under the hash of everything that they were made of, so a second
run compiles nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import subprocess
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
BUILD = ROOT / "build" / "emulator"
MODULE = "emulated_cuda"
NAMESPACE = "masked_loss_emulated"

CXX = shlex.split(os.environ.get("CXX", "c++"))
FLAGS = ["-std=c++17", "-O1", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += [f"-Dmasked_loss={NAMESPACE}", "-Wno-attributes", "-Wno-unknown-pragmas"]
TORCH_FLAGS = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]

# What the kernels, and the emulator, are compiled with to be watched: "address" finds accesses
# beyond torch's tensors (in a process that preloads libasan), "accesses" blocks that race.
WATCHED = {
    "address": ["-fsanitize=address", "-fno-omit-frame-pointer"],
    "accesses": ["-fsanitize=thread", "-fno-threadsafe-statics"],
}


def _headers(source: Path, csrc: Path) -> Iterable[Path]:
    """What a source may include; the formulas and kernels are no business of those with tensors."""
    yield from sorted(HERE.glob("*.h"))
    for path in sorted(path for path in csrc.rglob("*") if path.suffix in (".h", ".cuh")):
        if source.suffix == ".cu" or ".inl" not in path.name:
            yield path


EMULATOR = ("emulator.cpp", "accesses.cpp")


def _compile(source: Path, csrc: Path, watch: str | None) -> Path:
    """The object of one source; the sources with tensors see torch, the kernels do not."""
    flags = [*FLAGS, f"-I{HERE}", f"-I{csrc}"]
    if source.suffix == ".cu":  # a row's number once went through an overload for float
        flags.append("-Werror=float-conversion")
    if watch and (source.suffix == ".cu" or (watch == "address" and source.name in EMULATOR)):
        flags += WATCHED[watch]
    if source.suffix == ".cpp" and source.name not in EMULATOR:
        python = sysconfig.get_paths()["include"]
        flags += TORCH_FLAGS
        flags += [f"-isystem{p}" for p in (*include_paths(), pybind11.get_include(), python)]
    digest = hashlib.sha256(" ".join([*CXX, *flags]).replace(str(csrc), "").encode())
    for path in (source, *_headers(source, csrc)):
        digest.update(path.name.encode() + path.read_bytes())
    target = BUILD / f"{source.stem}-{digest.hexdigest()[:16]}.o"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.o")
        command = [*CXX, *flags, "-x", "c++", "-c", str(source), "-o", str(partial)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{shlex.join(command)}\n{result.stderr}")
        partial.rename(target)
    return target


def build(csrc: Path = ROOT / "csrc", watch: str | None = None) -> Path:
    """The extension module of the kernels in ``csrc``; ``watch``: one of WATCHED."""
    BUILD.mkdir(parents=True, exist_ok=True)
    sources = [
        *(path for path in sorted((csrc / "ops").glob("*.cpp")) if path.stem != "backend_of"),
        *sorted((csrc / "kernels" / "cuda").glob("*.cu")),
        HERE / "faults.cu",
        HERE / "device.cpp",
        HERE / "emulator.cpp",
        *([HERE / "accesses.cpp"] if watch == "accesses" else []),
    ]
    with (BUILD / "lock").open("w") as lock:  # workers of pytest-xdist wait for the first of them
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda source: _compile(source, csrc, watch), sources))
        digest = hashlib.sha256(" ".join(path.name for path in objects).encode())
        folder = BUILD / digest.hexdigest()[:16]
        module = folder / f"{MODULE}.so"
        if not module.exists():
            folder.mkdir(exist_ok=True)
            partial = module.with_suffix(".partial")
            libraries = [f"-L{p}" for p in library_paths()]
            libraries += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
            libraries += ["-fsanitize=address"] if watch == "address" else []
            command = [*CXX, "-shared", *map(str, objects), *libraries, "-o", str(partial)]
            subprocess.run(command, check=True)
            partial.rename(module)
    return module
