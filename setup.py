# SPDX-License-Identifier: BSD-3-Clause
"""Builds masked_loss/_C.so, the one library that holds every operator.

Settings, all from the environment:
  MASKED_LOSS_CUDA=auto|1|0    compile the CUDA kernels: when nvcc is found (default), always, never
  MASKED_LOSS_CUDA_RELEASE=1   compile them for every architecture that a release serves
  TORCH_CUDA_ARCH_LIST="9.0"   compile them for these instead, as in PyTorch
  CUDA_HOME, MAX_JOBS          where the CUDA toolkit is, how many compilers to run at once

The library uses the LibTorch stable ABI, so it is tied to neither the Python nor the torch that
built it: no Python symbol in it, and one wheel (py3-none-<platform>) for every torch from 2.10 on.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.errors import CompileError
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

WINDOWS = sys.platform == "win32"
# The oldest torch the library runs on: 2.10, the first with a stable parallel_for. The bytes are
# hexadecimal, 0x0a is ten.
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
# a * b + c is fused where the source says fma, and nowhere else.
CXX_FLAGS = [
    *("-O3", "-std=c++17", "-g0", "-fvisibility=hidden", "-fvisibility-inlines-hidden"),
    "-ffp-contract=off",
]
if WINDOWS:
    CXX_FLAGS = ["/O2", "/std:c++17", "/clang:-ffp-contract=off"]
NVCC_FLAGS = [
    *("-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all"),
    "-fmad=false",  # as on the CPU
]
DEFAULT_ARCHS = "8.0 9.0+PTX"
RELEASE_ARCHS = "7.5 8.0 8.6 8.9 9.0 10.0 10.3 12.0+PTX"

# torch calls ninja by name, but a ninja from PyPI is not on PATH in `.venv/bin/python setup.py`.
with suppress(ImportError):
    import ninja

    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])
if shutil.which("ninja") is None:
    raise SystemExit("setup.py: needs ninja; `pip install ninja`")


def compiler() -> str:
    """What torch's BuildExtension will call; without one the message says what to install."""
    # The vectors are those of GCC and Clang, which Microsoft's own compiler does not have.
    name = os.environ.get("CXX", "clang-cl" if WINDOWS else "c++")
    if shutil.which(shlex.split(name, posix=not WINDOWS)[0]) is None:
        raise SystemExit(
            f"setup.py: needs a C++17 compiler, GCC or Clang; {name!r} is not on PATH. Install one "
            "(Debian: `apt install g++`; macOS: `xcode-select --install`; Windows: LLVM, for "
            "clang-cl), set CXX to it, or take a wheel of masked_loss for this platform."
        )
    return name


def files(pattern: str) -> list[str]:
    """Sorted, so that the same tree gives the same library."""
    return sorted(glob.glob(pattern, recursive=True))


def cuda_home() -> Path | None:
    """The CUDA toolkit: $CUDA_HOME, the toolkit of the nvcc on PATH, /usr/local/cuda."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if value := os.environ.get(variable):
            return Path(value) if (Path(value) / "bin" / "nvcc").is_file() else None
    if nvcc := shutil.which("nvcc"):
        # The nvcc on PATH may be a wrapper or a link, so it is asked.
        dryrun = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
        )
        if found := re.search(r"^#\$ TOP=(.+)$", dryrun.stderr, re.MULTILINE):
            return Path(found[1]).resolve()
    default = Path("/usr/local/cuda")
    return default.resolve() if (default / "bin" / "nvcc").is_file() else None


def cuda_to_build_with() -> Path | None:
    """The CUDA toolkit, or None for a library without CUDA kernels."""
    wanted = os.environ.get("MASKED_LOSS_CUDA", "auto").lower()
    if wanted not in ("auto", "1", "0"):
        raise SystemExit(f"setup.py: MASKED_LOSS_CUDA must be auto, 1 or 0, got {wanted!r}")
    if wanted == "0" or not files("csrc/kernels/cuda/*.cu"):
        return None
    home = cuda_home()
    if home is None and wanted == "1":
        raise SystemExit(
            "setup.py: MASKED_LOSS_CUDA=1 needs nvcc; looked in $CUDA_HOME, on PATH and in "
            "/usr/local/cuda. Set CUDA_HOME, or MASKED_LOSS_CUDA=0 for a library without CUDA."
        )
    return home


def arch_flags() -> list[str]:
    """-gencode for each architecture of a list such as "8.0 9.0a 12.0+PTX"."""
    release = os.environ.get("MASKED_LOSS_CUDA_RELEASE", "0")
    if release not in ("0", "1"):
        raise SystemExit(f"setup.py: MASKED_LOSS_CUDA_RELEASE must be 1 or 0, got {release!r}")
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    archs = archs or (RELEASE_ARCHS if release == "1" else DEFAULT_ARCHS)
    flags = []
    for arch in re.findall(r"[^\s;,]+", archs):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", arch)
        if match is None:
            raise SystemExit(
                'setup.py: TORCH_CUDA_ARCH_LIST must hold numbers, such as "8.0 9.0+PTX", and no '
                f"names; got {arch!r}"
            )
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return list(dict.fromkeys(flags))


def cuda_library_dir(home: Path) -> str:
    for name in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (home / name / "libcudart_static.a").is_file():
            return str(home / name)
    raise SystemExit(f"setup.py: no libcudart_static.a below {home}; install the CUDA runtime")


def ninja_escape(text: str) -> str:
    return re.sub(r"([$ :])", r"$\1", text)


class Build(BuildExtension):
    """BuildExtension that compiles .cu files whatever the torch at hand is.

    torch finds no CUDA when it is a CPU-only torch, and refuses an nvcc of another major version. A
    stable-ABI library needs neither CUDA in torch nor the same version, so nvcc is called here.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        # One place for the objects of every kind of build: pip's editable install would compile
        # everything again in a temporary directory of its own.
        self.build_temp = os.path.join("build", "objects")

    def run(self) -> None:
        name = compiler()  # before torch looks for it, and warns that it is not the right one
        if WINDOWS:  # elsewhere torch finds it the same way
            os.environ["CXX"] = name
        with self.alone():
            super().run()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Two builds of one tree at a time would write the same objects."""
        directory = Path(self.build_temp)
        directory.mkdir(parents=True, exist_ok=True)
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        with (directory / "lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """None: on Windows setuptools asks for a Python module's, and this is a plain library."""
        return []

    def build_extension(self, ext: Extension) -> None:
        home = cuda_to_build_with()
        print(f"masked_loss: CUDA kernels {'from ' + str(home) if home else 'left out'}")
        if home is not None:
            self.add_cuda(ext, home)
        super().build_extension(ext)

    def add_cuda(self, ext: Extension, home: Path) -> None:
        defines = ["-DUSE_CUDA", "-DMASKED_LOSS_WITH_CUDA"]
        ext.extra_compile_args["cxx"] += defines
        ext.include_dirs.append(str(home / "include"))
        ext.extra_objects = self.compile_cuda(home, defines)
        ext.extra_link_args += [f"-L{cuda_library_dir(home)}", "-lcudart_static"]
        ext.extra_link_args += ["-lrt", "-lpthread", "-ldl"]

    def compile_cuda(self, home: Path, defines: list[str]) -> list[str]:
        """Compiles what changed, in parallel, and returns all objects."""
        directory = Path(self.build_temp).resolve() / "cuda"
        directory.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{os.path.abspath('csrc')}", *(f"-isystem={p}" for p in include_paths())]
        flags = [*NVCC_FLAGS, *arch_flags(), *DEFINES, *defines, *includes]
        if compiler := os.environ.get("CXX"):
            flags.append(f"-ccbin={compiler}")
        nvcc = home / "bin" / "nvcc"
        lines = [
            "rule nvcc",
            f"  command = {nvcc} {' '.join(flags)} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        objects = []
        for source in files("csrc/kernels/cuda/*.cu"):
            target = str(directory / (Path(source).stem + ".o"))
            objects.append(target)
            absolute = ninja_escape(os.path.abspath(source))
            lines.append(f"build {ninja_escape(target)}: nvcc {absolute}")
        (directory / "build.ninja").write_text("\n".join(lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run(["ninja", "-v", "-C", str(directory), *jobs]).returncode != 0:
            raise CompileError("nvcc failed, see above")
        return objects


class Wheel(bdist_wheel):
    """The library holds no Python symbol: one wheel for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


# CppExtension names torch's libraries itself; on Linux they come again because of their flags.
LINK_FLAGS = {
    # libtorch.so must be asked for by name although nothing in it is used: where torch has CUDA it
    # brings libtorch_cuda.so along, which the library's weak symbols bind to.
    "linux": [
        *("-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-Wl,--as-needed"),
        *("-Wl,--exclude-libs,ALL", "-Wl,--strip-debug"),
    ],
    "darwin": ["-Wl,-S"],  # no debugging symbols
}

extension = CppExtension(
    "masked_loss._C",
    files("csrc/**/*.cpp"),
    include_dirs=[os.path.abspath("csrc")],
    extra_compile_args={"cxx": [*CXX_FLAGS, *DEFINES]},
    extra_link_args=LINK_FLAGS.get(sys.platform, []),
    py_limited_api=True,  # keeps libtorch_python.so out
)

setup(
    ext_modules=[extension],
    cmdclass={
        "build_ext": Build.with_options(no_python_abi_suffix=True),
        "bdist_wheel": Wheel,
    },
)
