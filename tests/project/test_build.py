# SPDX-License-Identifier: BSD-3-Clause
"""The build: what is in the library, the wheel and the sdist, and how a C++ program uses them."""

from __future__ import annotations

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import has_cuda

import masked_loss
from masked_loss._op import library as loader

ROOT = Path(__file__).resolve().parents[2]
TORCH_ROOT = Path(torch.__file__).resolve().parent
LOSS_OF_EQUAL_LOGITS = 1.94591  # log 7

# Mean over the three tokens whose mask is 1 of seven equal logits.
COMPUTE_LOSS = """
import torch
mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
target = torch.ones(2, 3, dtype=torch.int64)
loss = torch.ops.masked_loss.cross_entropy(torch.zeros(2, 3, 7), target, mask, reduction="mean")
print(f"{loss.item():.5f}")
"""

LIST_OPERATORS = """
import sys, torch
torch.ops.load_library(sys.argv[1])
schemas = map(str, torch._C._jit_get_all_schemas())
print("\\n".join(sorted(schema for schema in schemas if schema.startswith("masked_loss::"))))
"""


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """The output of a command that must succeed. It sees no masked_loss but an installed one."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def tool(name: str) -> str:
    """A program from PATH or from this Python's environment; without it the test is skipped."""
    beside = Path(sys.executable).parent / name
    found = shutil.which(name) or (str(beside) if beside.is_file() else None)
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def dynamic_symbols(library: Path) -> list[tuple[str, str]]:
    """(kind, demangled name) of every symbol that the library takes or gives."""
    lines = run(tool("nm"), "-D", "-C", library).splitlines()
    return [(line[17:18], line[19:]) for line in lines]


def foreign_symbols(library: Path) -> list[str]:
    """Symbols that would tie the library to one torch or one Python."""
    foreign = re.compile(r"(^|[^\w])(at|c10)::|^_?Py")
    return [name for _, name in dynamic_symbols(library) if foreign.search(name)]


def test_tests_leave_a_device_out_only_where_kernels_are_missing(monkeypatch):
    def mean(*_):
        raise RuntimeError(message)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: None)
    monkeypatch.setattr(masked_loss, "masked_mean", mean)
    message = "masked_loss: this build has no CUDA kernels, and a CUDA tensor came."
    assert not has_cuda()
    message = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal"):
        has_cuda()


@pytest.fixture
def setup_py(monkeypatch) -> dict[str, Any]:
    """What setup.py defines; no setting is in the environment."""
    for name in list(os.environ):
        if name.startswith(("MASKED_LOSS_CUDA", "TORCH_CUDA", "CUDA_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    return runpy.run_path("setup.py")


@pytest.mark.parametrize(
    ("archs", "expected"),
    [
        ("8.0", ["80,code=sm_80"]),
        ("8.0;9.0+PTX", ["80,code=sm_80", "90,code=sm_90", "90,code=compute_90"]),
        (" 9.0a, 10.0f 12.0 9.0a ", ["90a,code=sm_90a", "100f,code=sm_100f", "120,code=sm_120"]),
        ("", ["80,code=sm_80", "90,code=sm_90", "90,code=compute_90"]),
    ],
)
def test_architectures(archs, expected, setup_py, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", archs)
    assert setup_py["arch_flags"]() == [f"-gencode=arch=compute_{flag}" for flag in expected]


def test_architectures_of_a_release(setup_py, monkeypatch):
    monkeypatch.setenv("MASKED_LOSS_CUDA_RELEASE", "1")
    found = re.findall(r",code=(\w+)", " ".join(setup_py["arch_flags"]()))
    archs = [75, 80, 86, 89, 90, 100, 103, 120]
    assert found == [*(f"sm_{arch}" for arch in archs), "compute_120"]


def test_a_release_is_wanted_or_not(setup_py, monkeypatch):
    monkeypatch.setenv("MASKED_LOSS_CUDA_RELEASE", "true")
    with pytest.raises(SystemExit, match="MASKED_LOSS_CUDA_RELEASE must be 1 or 0, got 'true'"):
        setup_py["arch_flags"]()


@pytest.mark.parametrize("archs", ["Hopper", "8.0 90", "8.0+ptx"])
def test_architectures_that_are_no_numbers(archs, setup_py, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", archs)
    with pytest.raises(SystemExit, match="must hold numbers, such as"):
        setup_py["arch_flags"]()


@pytest.mark.parametrize("wanted", ["auto", "1", "0"])
@pytest.mark.parametrize("there", [True, False])
def test_cuda_is_built_where_it_is_wanted(wanted, there, setup_py, monkeypatch, tmp_path):
    if there:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("MASKED_LOSS_CUDA", wanted)
    if wanted == "1" and not there:
        with pytest.raises(SystemExit, match="MASKED_LOSS_CUDA=1 needs nvcc"):
            setup_py["cuda_to_build_with"]()
    else:
        expected = tmp_path if there and wanted != "0" else None
        assert setup_py["cuda_to_build_with"]() == expected


def test_cuda_is_wanted_or_not(setup_py, monkeypatch):
    monkeypatch.setenv("MASKED_LOSS_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be auto, 1 or 0, got 'yes'"):
        setup_py["cuda_to_build_with"]()


def test_a_build_without_a_compiler_says_what_to_install(tmp_path):
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)],
        cwd=ROOT,
        env={"PATH": str(tmp_path), "MASKED_LOSS_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "setup.py: needs a C++17 compiler, GCC or Clang; 'c++' is not on PATH" in result.stderr
    assert "apt install g++" in result.stderr
    assert "Traceback" not in result.stderr
    assert "not compatible with the compiler" not in result.stderr  # what torch would say first


def test_library_is_tied_to_no_torch_and_no_python():
    assert foreign_symbols(loader.LIBRARY) == []


def test_library_takes_only_c_functions_from_torch():
    taken = {name for kind, name in dynamic_symbols(loader.LIBRARY) if kind in "Uw"}
    from_torch = {name for name in taken if "torch" in name}
    assert from_torch, "nm found no symbol of torch at all: is this the right library?"
    assert {name for name in from_torch if "(" in name or ":" in name} == set()


def test_symbol_check_sees_what_it_should():
    assert foreign_symbols(TORCH_ROOT / "lib" / "libtorch_python.so") != []


def test_library_needs_torch_by_name():
    """libtorch.so brings libtorch_cuda.so along, which the weak CUDA symbols bind to."""
    needed = re.findall(r"NEEDED.*\[(.+)\]", run(tool("readelf"), "-d", loader.LIBRARY))
    assert {"libtorch.so", "libtorch_cpu.so", "libc10.so"} <= set(needed)
    assert not [name for name in needed if "python" in name or "cudart" in name]


def test_missing_library_says_what_to_do(tmp_path):
    (tmp_path / "_C.cpython-312.so").touch()
    with pytest.raises(ImportError) as caught:
        loader.load(tmp_path / "_C.so")
    assert str(caught.value) == (
        "masked_loss: the compiled operators are missing.\n"
        f"Looked for: {tmp_path / '_C.so'}\n"
        "Found: _C.cpython-312.so\n"
        f"{ROOT} is a source checkout. Build it (this needs a C++ compiler):\n"
        f"    {sys.executable} -m pip install --no-build-isolation -e {ROOT}\n"
        "or run Python elsewhere, so that an installed masked_loss is found instead."
    )


def test_package_without_library_says_what_to_do(tmp_path):
    package = tmp_path / "masked_loss"
    shutil.copytree(ROOT / "masked_loss", package, ignore=shutil.ignore_patterns("_C*", "__*__"))
    shutil.copy(ROOT / "masked_loss" / "__init__.py", package)
    result = subprocess.run(
        [sys.executable, "-c", "import masked_loss"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "ImportError: masked_loss: the compiled operators are missing." in result.stderr
    assert f"Found: no file named _C* in {package}" in result.stderr
    assert "Install it again for this machine" in result.stderr
    assert "pip install --no-build-isolation --force-reinstall --no-deps ." in result.stderr


def test_library_for_another_machine_says_so(tmp_path):
    library = tmp_path / "_C.so"
    library.write_bytes(b"not a library at all")
    with pytest.raises(ImportError) as caught:
        loader.load(library)
    message = str(caught.value)
    assert message.startswith("masked_loss: the compiled operators do not fit this machine")
    assert f"a library for {platform.system()} {platform.machine()}, torch >= 2.10" in message
    assert f"(found torch {torch.__version__})" in message
    assert f"Found: {library}, which did not load:" in message
    assert re.search("invalid ELF header|file too short", message)
    assert "-m pip install --no-build-isolation" in message


@pytest.mark.parametrize("version", ["2.9.1+cpu", "1.13.1", "2.9.0a0+gitabc123"])
def test_old_torch_says_so(version):
    with pytest.raises(ImportError) as caught:
        loader.load(torch_version=version)
    assert str(caught.value) == (
        f"masked_loss: needs torch >= 2.10, found torch {version}.\n"
        f"Upgrade it: {sys.executable} -m pip install --upgrade torch"
    )


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "3.0.0a0+gitabc123"])
def test_torch_that_fits_is_accepted(version):
    loader.load(torch_version=version)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The sdist, unpacked."""
    directory = tmp_path_factory.mktemp("sdist")
    code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, directory)
    (archive,) = directory.glob("masked_loss-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(directory, filter="data")
    return directory / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def quick_compiler(tmp_path_factory) -> Path:
    """The compiler, which optimizes less than it is told: half the time, and the same symbols."""
    path = tmp_path_factory.mktemp("compiler") / "c++"
    compiler = os.environ.get("CXX", "c++")
    path.write_text(f"""#!/bin/bash
exec {compiler} "${{@/#-O3/-O1}}"
""")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def wheel(sdist, quick_compiler, tmp_path_factory) -> Path:
    """A wheel made from the sdist and nothing else, without CUDA to save time."""
    directory = tmp_path_factory.mktemp("wheel")
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"),
        *("-w", directory, sdist),
        cwd=directory,
        MASKED_LOSS_CUDA="0",
        CXX=str(quick_compiler),
    )
    (path,) = directory.glob("*.whl")
    return path


def test_sdist_holds_every_file_of_the_repository(sdist):
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout to compare with")
    tracked = set(run(tool("git"), "ls-files").splitlines())
    assert "csrc/ops/register.cpp" in tracked
    missing = [name for name in sorted(tracked) if not (sdist / name).is_file()]
    assert [name for name in missing if (ROOT / name).is_file()] == []


def test_sdist_holds_nothing_built(sdist):
    names = [path.name for path in sdist.rglob("*")]
    assert [name for name in names if name.endswith((".so", ".o", ".pyc", "_cache"))] == []


@pytest.mark.slow
def test_wheel_serves_every_python(wheel):
    assert re.fullmatch(
        rf"masked_loss-{re.escape(masked_loss.__version__)}-py3-none-linux_\w+\.whl", wheel.name
    )
    with zipfile.ZipFile(wheel) as archive:
        (info,) = [name for name in archive.namelist() if name.endswith(".dist-info/WHEEL")]
        text = archive.read(info).decode()
    assert "Root-Is-Purelib: false" in text
    assert re.search(r"^Tag: py3-none-linux_\w+$", text, re.MULTILINE)


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "masked_loss").rglob("*.py")}
    linter = (ROOT / "lint" / "masked_loss_lint").glob("*.py")
    modules |= {f"masked_loss_lint/{path.name}" for path in linter}
    typed = {"masked_loss/py.typed", "masked_loss_lint/py.typed"}
    assert names == modules | typed | {"masked_loss/_C.so"}


@pytest.mark.slow
def test_installed_wheel_computes(wheel, tmp_path):
    """Installed away from the sources, with no compiler on PATH."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel)
    code = "import masked_loss\nprint(masked_loss.__file__)\n" + COMPUTE_LOSS
    output = run(sys.executable, "-c", code, cwd=empty, PYTHONPATH=str(site), PATH=str(empty))
    file, loss = output.splitlines()
    assert Path(file).is_relative_to(site)
    assert float(loss) == LOSS_OF_EQUAL_LOGITS


@pytest.fixture(scope="module")
def cmake_build(quick_compiler, tmp_path_factory) -> Path:
    """The library and the C++ example, built by CMake."""
    directory = tmp_path_factory.mktemp("cmake")
    cmake = tool("cmake")
    run(
        *(cmake, "-S", ROOT, "-B", directory, "-G", "Ninja"),
        *(f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DTORCH_ROOT={TORCH_ROOT}"),
        *("-DMASKED_LOSS_CUDA=0", "-DMASKED_LOSS_EXAMPLES=ON"),
        f"-DCMAKE_CXX_COMPILER={quick_compiler}",
    )
    run(cmake, "--build", directory)
    return directory


@pytest.mark.slow
def test_cmake_builds_the_same_operators(cmake_build):
    library = cmake_build / "libmasked_loss.so"
    assert foreign_symbols(library) == []
    outputs = [
        run(sys.executable, "-c", LIST_OPERATORS, path) for path in (library, loader.LIBRARY)
    ]
    assert "masked_loss::cross_entropy(" in outputs[0]
    assert outputs[0] == outputs[1]


@pytest.mark.slow
@pytest.mark.parametrize("built_by", ["cmake", "setup.py"])
def test_cpp_example(cmake_build, built_by):
    library = cmake_build / "libmasked_loss.so" if built_by == "cmake" else loader.LIBRARY
    output = run(cmake_build / "examples" / "cpp" / "masked_cross_entropy", library)
    assert float(output) == LOSS_OF_EQUAL_LOGITS


def test_versions_agree():
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    (cmake,) = re.findall(
        r"project\(masked_loss VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text()
    )
    assert masked_loss.__version__ == version == cmake


@pytest.mark.parametrize("name", ["ruff", "clang-format", "mypy"])
def test_pinned_tools_agree(name):
    (pinned,) = set(re.findall(rf'"{name}==(.+)"', (ROOT / "pyproject.toml").read_text()))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    (hook,) = re.findall(rf"repo: \S+{name}\S*\n    rev: v(\S+)", hooks)
    assert hook == pinned


def test_oldest_torch_agrees():
    major, minor = loader.OLDEST_TORCH
    hexadecimal = f"0x{major:02x}{minor:02x}000000000000"
    assert f"TORCH_TARGET_VERSION={hexadecimal}" in (ROOT / "setup.py").read_text()
    assert f"TORCH_TARGET_VERSION={hexadecimal}" in (ROOT / "CMakeLists.txt").read_text()
    assert f'dependencies = ["torch>={major}.{minor}",' in (ROOT / "pyproject.toml").read_text()
