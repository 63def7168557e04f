"""What a build does about nvcc, on machines that are made up of a stand-in driver and stand-in compilers."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FIND_NVCC = ROOT / "cmake" / "find_nvcc.py"

pytestmark = pytest.mark.skipif(
    not FIND_NVCC.exists() or sys.platform != "linux" or shutil.which("c++") is None,
    reason="needs the sources, Linux and a C++ compiler",
)

#: The functions of libcuda that tell versions and GPUs. The environment says what they tell.
DRIVER = """
#include <cstdlib>
static int number(const char* name) { return std::getenv(name) ? std::atoi(std::getenv(name)) : 0; }
extern "C" {
int cuDriverGetVersion(int* version) { *version = number("DRIVER_CUDA"); return 0; }
int cuInit(unsigned) { return number("DRIVER_CAPABILITY") ? 0 : 100; }
int cuDeviceGetCount(int* count) { *count = 1; return 0; }
int cuDeviceGet(int* device, int index) { *device = index; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
  const int capability = number("DRIVER_CAPABILITY");
  *value = attribute == 75 ? capability / 10 : capability % 10;
  return 0;
}
}
"""

WHEELS_13_0 = [
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl>=13,<14",
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a stand-in libcuda.so.1."""
    folder = tmp_path_factory.mktemp("driver")
    (folder / "cuda.cpp").write_text(DRIVER)
    subprocess.run(["c++", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", folder / "cuda.cpp"], check=True)
    return folder


def write_nvcc(folder: Path, version: str) -> Path:
    """A program that says that it is nvcc of this version, and can nothing else."""
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True, exist_ok=True)
    release = version.rpartition(".")[0]
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{version}'\n")
    path.chmod(0o755)
    return path


def write_wheels(site: Path, version: str) -> Path:
    """The files of the compiler wheels by which a build recognises them."""
    root = site / "nvidia" / "cu13"
    for part in ("nvvm/bin/cicc", "include/crt/host_config.h", "include/cuda_runtime.h", "include/nv/target"):
        (root / part).parent.mkdir(parents=True, exist_ok=True)
        (root / part).touch()
    return write_nvcc(root, version)


class Machine(NamedTuple):
    """A machine with a driver for this CUDA version, a GPU of this compute capability, and these toolkits."""

    driver: Path
    home: Path
    cuda: tuple[int, int] | None = None
    capability: str = ""
    toolkits: tuple[Path, ...] = ()  #: the first in CUDA_HOME, the second on the PATH

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA", "SKBUILD", "CMAKE"))}
        home, on_path = (*(str(path.parent) for path in self.toolkits), str(self.home), str(self.home))[:2]
        compilers = self.home / "compilers"  # as the folders of the PATH may have an nvcc, too
        compilers.mkdir(exist_ok=True)
        for name in ("c++", "cc", "cmake", "ninja", "make", "as", "ld", "sh"):
            if (found := shutil.which(name)) and not (compilers / name).exists():
                (compilers / name).symlink_to(found)
        return kept | {
            "PATH": os.pathsep.join([on_path, str(compilers)]),
            "CUDA_HOME": str(Path(home).parent),
            "LD_LIBRARY_PATH": str(self.driver),
            "DRIVER_CUDA": str(self.cuda[0] * 1000 + self.cuda[1] * 10) if self.cuda else "0",
            "DRIVER_CAPABILITY": self.capability.replace(".", ""),
        }

    def choice(self, mode: str = "auto", architectures: str = "auto", site: Path | None = None) -> Any:
        """What find_nvcc.py prints."""
        environment = self.environment() | ({"PYTHONPATH": str(site)} if site else {})
        command = [sys.executable, "-S", FIND_NVCC, mode, architectures, self.home / "build"]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert found.returncode == 0, found.stderr
        return json.loads(found.stdout)


@pytest.fixture
def machine(driver: Path, tmp_path: Path) -> Machine:
    """A machine without a driver and without a toolkit."""
    home = tmp_path / "machine"
    home.mkdir()
    return Machine(driver, home)


@pytest.mark.quick
def test_a_driver_without_a_toolkit_asks_for_the_wheels(machine: Machine) -> None:
    choice = machine._replace(cuda=(13, 0), capability="9.0").choice()
    assert choice["wheels"] == WHEELS_13_0 and choice["architectures"] == "90" and not choice["nvcc"]
    for looked in ("CUDA_HOME", "PATH", "/usr/local/cuda", sys.executable):
        assert looked in choice["notes"]


@pytest.mark.parametrize("cuda", [(13, 2), (14, 1)])
def test_newer_drivers_get_the_version_that_the_kernels_are_written_for(
    machine: Machine, cuda: tuple[int, int]
) -> None:
    assert machine._replace(cuda=cuda, capability="8.0").choice()["wheels"] == WHEELS_13_0


def test_a_driver_that_is_too_old_for_the_wheels_says_so(machine: Machine) -> None:
    old = machine._replace(cuda=(12, 4), capability="8.6")
    assert old.choice("wheels")["wheels"] == WHEELS_13_0, "for wheels that travel"
    choice = old.choice()
    assert choice["wheels"] == [] and choice["is_wanted"]
    assert "CUDA 12.4 at most" in choice["notes"] and "a CUDA toolkit that it can run, 12.3 or newer" in choice["notes"]


def test_neither_driver_nor_toolkit_fetches_nothing(machine: Machine) -> None:
    choice = machine.choice()
    assert choice["wheels"] == [] and not choice["nvcc"] and not choice["is_wanted"]
    assert "no nvcc" in choice["notes"] and "no NVIDIA driver" in choice["notes"]
    assert machine.choice("wheels")["wheels"] == WHEELS_13_0
    assert machine.choice("ON")["wheels"] == WHEELS_13_0
    assert machine.choice("OFF")["wheels"] == []


def test_a_toolkit_that_is_new_enough_is_used(machine: Machine, tmp_path: Path) -> None:
    in_home, on_path = write_nvcc(tmp_path / "a", "12.8.93"), write_nvcc(tmp_path / "b", "13.1.80")
    both = machine._replace(cuda=(13, 1), capability="8.9", toolkits=(in_home, on_path))
    assert both.choice()["nvcc"] == str(in_home) and both.choice()["architectures"] == "80"
    assert both.choice("wheels")["wheels"], "wheels: the user wants the compiler of the wheels"
    without_driver = machine._replace(toolkits=(in_home,)).choice()
    assert without_driver["nvcc"] == str(in_home) and without_driver["architectures"] == "80;90"


@pytest.mark.parametrize("cuda", [None, (13, 0)])
def test_a_toolkit_that_is_too_old(machine: Machine, tmp_path: Path, cuda: tuple[int, int] | None) -> None:
    old, good = write_nvcc(tmp_path / "a", "12.2.140"), write_nvcc(tmp_path / "b", "12.3.107")
    choice = machine._replace(cuda=cuda, toolkits=(old,)).choice()
    assert f"{old} (CUDA_HOME) is not used: its version is 12.2.140, expected 12.3 or newer" in choice["notes"]
    assert choice["wheels"] == (WHEELS_13_0 if cuda else []) and not choice["nvcc"]
    assert machine._replace(cuda=cuda, toolkits=(old, good)).choice()["nvcc"] == str(good)


def test_a_toolkit_that_the_driver_cannot_run_or_that_is_broken(machine: Machine, tmp_path: Path) -> None:
    new, broken = write_nvcc(tmp_path / "a", "13.0.88"), write_nvcc(tmp_path / "b", "no")
    choice = machine._replace(cuda=(12, 9), capability="9.0", toolkits=(new, broken)).choice()
    assert not choice["nvcc"] and "13.0.88, and the driver runs programs of CUDA 12.9 at most" in choice["notes"]
    assert f"{broken} (the PATH) is not used: `nvcc --version` fails" in choice["notes"]


def test_architectures(machine: Machine, tmp_path: Path) -> None:
    here = machine._replace(cuda=(13, 0), capability="9.0", toolkits=(write_nvcc(tmp_path, "13.0.88"),))
    assert here.choice(architectures="all")["architectures"] == "80;90"
    assert here.choice(architectures="90,80")["architectures"] == "80;90"
    assert here.choice(architectures="80")["architectures"] == "80"
    assert here._replace(capability="12.0").choice()["architectures"] == "80", "by way of PTX"
    turing = here._replace(capability="7.5").choice()
    assert not turing["nvcc"] and "compute capability 7.5, expected 8.0 or higher" in turing["notes"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [(("on", "auto"), "FUSED_ATTN_CUDA: expected auto, ON"), (("auto", "75"), "ARCHITECTURES: expected auto, all")],
)
def test_wrong_settings(settings: tuple[str, str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, FIND_NVCC, *settings, tmp_path]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode != 0 and message in found.stderr and "Traceback" not in found.stderr


def test_the_compiler_of_the_wheels_is_kept_for_the_next_build(machine: Machine, tmp_path: Path) -> None:
    site = tmp_path / "site-packages"
    installed = write_wheels(site, "13.0.88")
    here = machine._replace(cuda=(13, 0), capability="9.0")
    (installed.parents[1] / "lib").mkdir()
    kept = here.choice(site=site)["nvcc"]
    assert kept == str(here.home / "build" / "nvcc-13.0.88" / "bin" / "nvcc")
    again = here.choice()
    assert again["nvcc"] == kept and again["wheels"] == []
    assert (Path(kept).parents[1] / "lib64").is_dir(), "where this nvcc looks for libraries"
    (Path(kept).parents[1] / "nvvm" / "bin" / "cicc").unlink()
    assert here.choice()["wheels"] == WHEELS_13_0, "a compiler without one of its parts is none"


def requirements(machine: Machine, settings: dict[str, str], **environment: str) -> list[str]:
    """What the build backend asks pip for, besides what scikit-build-core does."""
    pytest.importorskip("scikit_build_core")
    code = f"import build_backend as b; print(b.get_requires_for_build_editable({settings!r}))"
    environment = machine.environment() | {"PYTHONPATH": str(ROOT / "cmake")} | environment
    shutil.copy(ROOT / "pyproject.toml", machine.home)
    asked = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=machine.home, capture_output=True, text=True, timeout=60
    )
    assert asked.returncode == 0, asked.stderr
    lines = asked.stdout.splitlines()
    found = [name for name in eval(lines[-1]) if name.startswith("nvidia")]
    assert bool(found) == any("Asks for the compiler wheels" in line for line in lines)
    return found


def test_the_build_backend_asks_for_the_wheels_where_the_build_needs_them(machine: Machine) -> None:
    here = machine._replace(cuda=(13, 0), capability="9.0")
    assert requirements(here, {}) == WHEELS_13_0
    assert requirements(here, {"cmake.define.FUSED_ATTN_CUDA": "OFF"}) == []
    assert requirements(here, {"cmake.define.FUSED_ATTN_SANITIZE": "ON"}) == []
    assert requirements(here, {"wheel.cmake": "false"}) == []
    assert requirements(here, {}, PATH="", CXX="") == [], "nvcc is of no use without a C++ compiler"
    assert requirements(machine, {}) == []
    assert requirements(machine, {"cmake.define.FUSED_ATTN_CUDA": "wheels"}) == WHEELS_13_0


def configure(machine: Machine, folder: Path, *settings: str) -> tuple[int, str]:
    """Runs CMake, without a build: its exit status, and its output with single spaces."""
    pytest.importorskip("pybind11")
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake on the PATH")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    command = ["cmake", "-S", ROOT, "-B", folder, *generator, f"-DPython_EXECUTABLE={sys.executable}"]
    done = subprocess.run(
        [*command, *(f"-D{setting}" for setting in settings)], env=machine.environment(), capture_output=True, text=True
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.mark.slow
def test_cmake_says_what_it_does_without(machine: Machine, tmp_path: Path) -> None:
    """All in one build folder, so that CMake examines the C++ compiler only once."""
    status, text = configure(machine, tmp_path / "build")
    assert status == 0 and "no CUDA kernels: no nvcc in" in text and "FUSED_ATTN_CUDA=wheels builds them" in text
    status, text = configure(machine._replace(cuda=(13, 0), capability="9.0"), tmp_path / "build")
    assert status == 0 and "WITHOUT its CUDA kernels" in text and "no compiler wheels of CUDA 13.0" in text
    broken = machine._replace(toolkits=(write_nvcc(tmp_path, "13.0.88"),))
    status, text = configure(broken, tmp_path / "build", "FUSED_ATTN_CUDA=ON")
    assert status != 0 and "it cannot compile a small program" in text and "/bin/nvcc" in text
    for setting, expected in instruction_sets():
        status, text = configure(machine, tmp_path / "build", "FUSED_ATTN_CUDA=OFF", f"FUSED_ATTN_CPU_ISAS={setting}")
        assert (status == 0) == (not expected.startswith("expected")) and expected in text
        if status == 0:
            is_spare = setting == "auto" and not expected.endswith("for baseline --")
            assert has_quick_baseline(tmp_path / "build") == is_spare, setting


def has_quick_baseline(folder: Path) -> bool:
    """Whether the baseline CPU kernels are compiled with -O1: where the machine has better ones, and not for tests."""
    commands = json.loads((folder / "compile_commands.json").read_text())
    (command,) = (x["command"] for x in commands if x["file"].endswith("kernels_baseline.cpp"))
    return "-O1" in command.split()


@pytest.mark.slow
def test_the_build_records_its_settings(machine: Machine, tmp_path: Path) -> None:
    def recorded(*settings: str) -> str:
        status, text = configure(machine, tmp_path / "build", *settings)
        assert status == 0, text
        commands = json.loads((tmp_path / "build" / "compile_commands.json").read_text())
        (command,) = (each["command"] for each in commands if each["file"].endswith("csrc/python/bindings.cpp"))
        (definition,) = (word for word in shlex.split(command) if word.startswith("-DFUSED_ATTN_SETTINGS="))
        return definition.partition("=")[2]

    assert recorded() == '""'
    given = ("FUSED_ATTN_CPU_ISAS=avx2;baseline", "FUSED_ATTN_CUDA=OFF", "FUSED_ATTN_CUDA_ARCHITECTURES=80,90")
    if "avx2" not in dict(instruction_sets()).get("all", ""):
        given = ("FUSED_ATTN_CPU_ISAS=baseline;baseline", *given[1:])
    assert recorded(*given) == f'"{" ".join(given).replace(";", ",")}"'


def instruction_sets() -> list[tuple[str, str]]:
    """Values of the setting FUSED_ATTN_CPU_ISAS, each with what CMake says to it on this machine."""
    texts = [("sse9", "expected auto, runnable, all or a list of baseline")]
    try:
        from fused_attn import _C
    except ImportError:
        return texts
    best = _C.best_cpu_isa()
    with_bfloat16 = ["avx512", "avx512_bf16"]
    needed = {"baseline": [], "avx512_bf16": with_bfloat16, "amx": ["avx512", "amx"]}.get(best, [best])
    texts.append(("auto", f"CPU kernels for {' '.join(['baseline', *needed])} --"))
    texts.append(("baseline", "CPU kernels for baseline --"))
    if best != "baseline":
        texts.append(("all", "CPU kernels for baseline avx2 avx512 "))
        texts.append(("runnable", f"CPU kernels for baseline avx2 {'--' if best == 'avx2' else 'avx512 '}"))
        texts.append(("amx", "CPU kernels for baseline avx512 amx --"))
        texts.append(("avx512_bf16,avx2", f"CPU kernels for {' '.join(['baseline', 'avx2', *with_bfloat16])} --"))
    return texts
