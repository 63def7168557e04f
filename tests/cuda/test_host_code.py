"""Runs the host code that nvcc has compiled, without a GPU: a stand-in for CUDA records launches and tensor maps.

Each launch has to fit what the machine code of its kernel allows, and what its GPU has. recorded_runtime.cpp is the
stand-in.

In the emulation, g++ compiles the host code. It knows nothing of device functions, launch bounds and registers. So it
accepts a launch that a GPU refuses, and it runs a call of a device function by host code, which nvcc compiles to a call
of exit.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.machinery
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cases
import pytest
import torch
from cases import Case
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernels import dividing_gradients, is_built_for, of_architecture
from test_binary import cuobjdump
from test_cuda_kernels import ARCHITECTURES, MIXED_FEATURES, NAMES, random_cases
from test_fuzz import fuzz

from fused_attn import fused_attention
from fused_attn.backends.cuda import backend as cuda
from fused_attn.backends.cuda import hardware

ROOT = Path(__file__).resolve().parents[2]

#: The shared memory that a block of threads may have: on sm_90, and on the smaller GPUs on which kernels for sm_80 run
#: (sm_86, sm_89 and sm_120).
MOST_SHARED_BYTES = {"sm_90a": 227 * 1024, "sm_80": 99 * 1024}
#: What a kernel gets if the host code does not ask for more.
SHARED_BYTES_WITHOUT_ASKING = 48 * 1024
REGISTERS_OF_MULTIPROCESSOR = 65536
REGISTERS_AT_ONCE = 8  # the registers of a thread are allotted in multiples of this

HEAD_AND_VALUE_DIMS = [*((dim, dim) for dim in cuda.HEAD_DIMS), (192, 128)]
FEATURES: dict[str, dict] = {
    "plain": {"has_dlse": True},
    "causal": {"options": {"is_causal": True}},
    "padding": {"key_padding_mask": cases.padding(590, 413), "sinks": cases.sink()},
    **MIXED_FEATURES,
    "bias-of-keys": {"attn_mask": cases.float_mask("1H1S")},
    "float-bias-of-keys": {"attn_mask": cases.float_mask("1H1S", torch.float32)},
    "divided-gradients": {},
    "one-query": {"seqlen_q": 1},  # in the decode kernels
    "packed": {"lengths_q": (150, 0, 70), "lengths_k": (200, 30, 0), "options": {"is_causal": True}},
    "pages": {"seqlen_q": 5, "key_lengths": (150, 7), "page_size": 32},
    "pages-of-prompts": {"seqlen_q": 150, "key_lengths": (150, 7), "page_size": 32},
    "packed-pages": {"lengths_q": (150, 1), "key_lengths": (150, 7), "page_size": 32},
}


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    shared_limit: int  # 0 = the host code has not set it


class TensorMap(NamedTuple):
    """What the host code has asked the driver for, in its terms: see cuTensorMapEncodeTiled."""

    is_accepted: bool  # otherwise the arguments break a rule of the driver
    type: int
    address: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes, from dimension 1 on
    box: tuple[int, ...]
    swizzle: int


class HostCode:
    """The Python module of the CUDA kernels, with the stand-in in place of the CUDA runtime."""

    def __init__(self, path: Path) -> None:
        loader = importlib.machinery.ExtensionFileLoader("_cuda", str(path))
        self._module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_cuda", loader))
        loader.exec_module(self._module)
        self._library = ctypes.CDLL(str(path))

    def _text(self, function: str) -> str:
        entry = getattr(self._library, function)
        entry.restype = ctypes.c_char_p
        return entry().decode()

    @contextlib.contextmanager
    def running(self, architecture: int) -> Iterator[None]:
        """Within this context, backend="cuda" runs this module, which writes no results."""
        before = hardware.module
        hardware.module = self._module
        try:
            with of_architecture(architecture):
                yield
        finally:
            hardware.module = before

    def launches(self) -> list[Launch]:
        """Those since the last call."""
        found = []
        for line in self._text("recorded_launches").splitlines():
            kernel, *numbers = line.split()
            x, y, z, *others = map(int, numbers)
            found.append(Launch(kernel, (x, y, z), *others))
        return found

    def tensor_maps(self) -> list[TensorMap]:
        """Those since the last call."""
        found = []
        for line in self._text("recorded_tensor_maps").splitlines():
            is_accepted, element, address, *sizes, swizzle = map(int, line.split())
            dims, strides, box = (tuple(sizes[begin:end]) for begin, end in ((0, 4), (4, 7), (7, 11)))
            found.append(TensorMap(bool(is_accepted), element, address, dims, strides, box, swizzle))
        return found

    def accepts(self, x: TensorMap) -> bool:
        """Whether the stand-in for the driver accepts the tensor map."""
        sizes = ((ctypes.c_uint64 * 4)(*x.dims), (ctypes.c_uint64 * 3)(*x.strides), (ctypes.c_uint32 * 4)(*x.box))
        address = ctypes.c_uint64(x.address)
        return bool(self._library.tensor_map_is_accepted(x.type, address, *sizes, x.swizzle))

    def kernels(self) -> set[str]:
        return set(self._text("registered_kernels").split())


@pytest.fixture(scope="session")
def linked() -> Path:
    """The module of the CUDA kernels in the build folder of an editable installation."""
    module = importlib.util.find_spec("fused_attn._cuda")
    found = [] if module is None else list(ROOT.glob(f"build/*/{Path(module.origin).name}"))
    if not found or shutil.which("g++") is None:
        pytest.skip("needs an editable installation with CUDA kernels, for its object files, and g++")
    return max(found, key=lambda path: path.stat().st_mtime)


@pytest.fixture(scope="session")
def host_code(linked: Path, tmp_path_factory: pytest.TempPathFactory) -> HostCode:
    """One for each process, because pybind11 loads a module once for each name. Workers may come back to this file."""
    # The folder may also have object files of earlier settings, which the module does not contain.
    rule = re.search(
        rf"^build {re.escape(linked.name)}: (.*)", (linked.parent / "build.ninja").read_text(), re.MULTILINE
    )
    objects = [linked.parent / name for name in re.findall(r"\S+\.o\b", rule[1].partition("|")[0])]
    if missing := [path.name for path in objects if not path.exists()]:
        pytest.skip(f"the build folder is that of an unfinished build, which lacks {missing}")
    path = tmp_path_factory.mktemp("host") / "_cuda.so"
    # The linker takes the first definition of runs_on_cpu, which is that of the stand-in.
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wl,-z,muldefs"]
    source = Path(__file__).with_name("recorded_runtime.cpp")
    subprocess.run(["g++", *flags, source, *objects, "-o", path], check=True)
    return HostCode(path)


class Code(NamedTuple):
    """What the machine code of a kernel was compiled for."""

    registers: int  # of a thread
    threads: int  # the largest block of threads, by its launch bounds


@pytest.fixture(scope="module")
def built(linked: Path) -> dict[tuple[str, str], Code]:
    """(architecture, kernel) -> code, for all kernels."""

    def dump(option: str) -> str:
        return subprocess.run([cuobjdump(), option, linked], capture_output=True, text=True, check=True).stdout

    registers, threads = {}, {}
    architecture = kernel = ""
    usage = r"arch = (\w+)$|Function (\S+):\n\s*REG:(\d+)"
    for match in re.finditer(usage, dump("--dump-resource-usage"), re.MULTILINE):
        architecture = match[1] or architecture
        if match[2]:
            registers[architecture, match[2]] = int(match[3])
    bounds = r"arch = (\w+)$|^\.nv\.info\.(\S+)|EIATTR_MAX_THREADS\n.*\n\s*Value:\s*(\w+) (\w+) (\w+)"
    for match in re.finditer(bounds, dump("-elf"), re.MULTILINE):
        architecture = match[1] or architecture
        kernel = match[2] or kernel
        if match[3]:
            x, y, z = (int(number, 16) for number in match.group(3, 4, 5))
            threads[architecture, kernel] = x * y * z
    assert registers.keys() == threads.keys()
    return {key: Code(registers[key], threads[key]) for key in registers}


def faults(launch: Launch, code: Code, most_shared_bytes: int) -> list[str]:
    """Why a GPU refuses the launch, or why the kernel would not be the one that was compiled."""
    found = []
    if launch.threads != code.threads:
        found.append(f"{launch.threads} threads, and its launch bounds say {code.threads}")
    registers = -(-code.registers // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    if registers * launch.threads > REGISTERS_OF_MULTIPROCESSOR:
        found.append(f"{launch.threads} threads of {registers} registers")
    if launch.shared_bytes > max(launch.shared_limit, SHARED_BYTES_WITHOUT_ASKING):
        found.append(f"{launch.shared_bytes} bytes of shared memory, and its limit is {launch.shared_limit}")
    if max(launch.shared_bytes, launch.shared_limit) > most_shared_bytes:
        found.append(f"{launch.shared_bytes} bytes of shared memory, and the GPU has {most_shared_bytes}")
    if not 0 < launch.grid[0] < 2**31 or launch.grid[1:] != (1, 1):
        found.append(f"a grid of {launch.grid}")
    return found


def assert_accepted(launch: Launch, architecture: int, built: dict[tuple[str, str], Code]) -> None:
    """A GPU on which kernels of this architecture run accepts the launch."""
    is_for_hopper = ("sm_90a", launch.kernel) in built
    # Kernels that are no kernels for sm_90a alone also run on smaller GPUs.
    most = MOST_SHARED_BYTES["sm_90a" if is_for_hopper else "sm_80"]
    machine = "sm_80" if architecture == 80 else "sm_90a" if is_for_hopper else "sm_90"
    assert (machine, launch.kernel) in built, f"{launch.kernel} has no machine code for {machine}"
    found = faults(launch, built[machine, launch.kernel], most)
    assert not found, f"{launch.kernel}: {found}"


@pytest.mark.slow
def test_a_gpu_accepts_every_launch(host_code: HostCode, built: dict[tuple[str, str], Code]) -> None:
    """Every kernel is launched, for both types and every head dim."""
    launched = set()
    for architecture in filter(is_built_for, ARCHITECTURES):
        for head_dim, value_dim in HEAD_AND_VALUE_DIMS:
            for name, features in FEATURES.items():
                sizes = {"heads": 4, "kv_heads": 2, "seqlen_q": 333, "seqlen_k": 590}
                dims = {"head_dim": head_dim, "value_dim": value_dim}
                case = Case(f"{name}-{head_dim}-{value_dim}", **sizes | dims | features)
                splits = 2 if name == "divided-gradients" else 1
                for dtype in NAMES:
                    with host_code.running(architecture), dividing_gradients(splits, splits):
                        cases.run(case.make(dtype), "cuda")
                    found = host_code.launches()
                    assert found, case
                    assert all(x.is_accepted for x in host_code.tensor_maps()), case
                    launched.update((architecture, launch) for launch in found)
    assert host_code.kernels() == {launch.kernel for _, launch in launched}
    for architecture, launch in launched:
        assert_accepted(launch, architecture, built)


@settings(fuzz, max_examples=settings().max_examples // 3)
@given(case=random_cases(), dtype=st.sampled_from(list(NAMES)), architecture=st.sampled_from(ARCHITECTURES))
def test_a_gpu_accepts_random_launches(
    case: Case, dtype: torch.dtype, architecture: int, host_code: HostCode, built: dict[tuple[str, str], Code]
) -> None:
    """Of any sizes and memory layouts. No kernel runs, so these may be many."""
    has_odd_pages = (case.page_size or 0) % hardware.PAGE_STEP != 0  # the kernels for sm_80 load them on every GPU
    assume(is_built_for(architecture) and (not has_odd_pages or is_built_for(80)))
    with host_code.running(architecture):
        cases.run(case.make(dtype), "cuda")
    for launch in host_code.launches():
        assert_accepted(launch, 80 if has_odd_pages else architecture, built)
    assert all(x.is_accepted for x in host_code.tensor_maps())


#: CUtensorMapDataType and CUtensorMapSwizzle.
DRIVER_TYPES = {torch.float16: 6, torch.bfloat16: 9}
SWIZZLE_64B, SWIZZLE_128B = 2, 3


@pytest.mark.parametrize("dtype", DRIVER_TYPES, ids=str)
def test_tensor_maps_describe_the_tensors(host_code: HostCode, dtype: torch.dtype) -> None:
    """The emulation makes tensor maps without the driver, so it does not see what the driver is told."""
    if not is_built_for(90):
        pytest.skip("built without the kernels for sm_90a")

    def rows(heads: int, length: int, columns: int) -> torch.Tensor:
        return torch.randn(2, length, heads, columns + 8, dtype=dtype)[..., :columns].transpose(1, 2)

    query, key, value = rows(4, 333, 40), rows(2, 590, 40), rows(2, 590, 40)
    bias = torch.randn(4, 333, 592, dtype=dtype)[..., :590]
    with host_code.running(90):
        host_code.tensor_maps()
        attention = functools.partial(
            fused_attention, query.requires_grad_(), key, value, enable_gqa=True, backend="cuda"
        )
        out = attention()
        forward = {x.address: x for x in host_code.tensor_maps()}
        attention(attn_mask=bias).sum().backward()
        backward = {x.address: x for x in host_code.tensor_maps()}  # of a map for each address, the last one

    def expected(x: torch.Tensor, box_rows: int, box_columns: int, swizzle: int) -> TensorMap:
        batch, heads, length, columns = x.shape
        strides = tuple(2 * stride for stride in (x.stride(2), x.stride(1), x.stride(0)))
        dims, box = (columns, length, heads, batch), (box_columns, box_rows, 1, 1)
        return TensorMap(True, DRIVER_TYPES[dtype], x.data_ptr(), dims, strides, box, swizzle)

    # Plain forward with head dim 64: tiles of 192 queries and 128 keys, and each warp stores 16 rows.
    for x, box_rows in ((query, 192), (key, 128), (value, 128), (out, 16)):
        assert forward.pop(x.data_ptr()) == expected(x, box_rows, 64, SWIZZLE_128B)
    assert not forward
    # Its general backward: tiles of 64 queries, and keys in panels of 32 columns.
    for x, sizes in ((query, (64, 64, SWIZZLE_128B)), (key, (128, 32, SWIZZLE_64B)), (value, (128, 32, SWIZZLE_64B))):
        assert backward[x.data_ptr()] == expected(x, *sizes)
    bias_strides = (2 * 592, 2 * 333 * 592, 16)  # a dimension with one entry may have any stride
    assert backward[bias.data_ptr()] == expected(bias[None], 64, 64, SWIZZLE_128B)._replace(strides=bias_strides)


@pytest.mark.parametrize(
    "change",
    [
        {"type": 5},
        {"address": 0},
        {"address": 4104},
        {"dims": (64, 0, 4, 2)},
        {"dims": (64, 333, 4, 2**32 + 1)},
        {"strides": (128, 128 * 333, 8)},
        {"strides": (128, 2**40, 16)},
        {"box": (64, 257, 1, 1)},
        {"box": (64, 0, 1, 1)},
        {"box": (4, 128, 1, 1)},
        {"box": (72, 128, 1, 1)},
        {"swizzle": SWIZZLE_64B},
        {"swizzle": 4},
    ],
    ids=str,
)
def test_what_the_driver_refuses(change: dict, host_code: HostCode) -> None:
    good = TensorMap(True, 6, 4096, (64, 333, 4, 2), (128, 128 * 333, 128 * 333 * 4), (64, 128, 1, 1), SWIZZLE_128B)
    assert host_code.accepts(good)
    assert not host_code.accepts(good._replace(**change))


def test_what_a_gpu_refuses() -> None:
    code = Code(registers=168, threads=384)
    good = Launch("kernel", (132, 1, 1), 384, 200_000, 200_000)
    most = MOST_SHARED_BYTES["sm_90a"]
    assert faults(good, code, most) == []
    for launch in (
        good._replace(threads=512),
        good._replace(shared_limit=0),
        good._replace(shared_bytes=most + 1, shared_limit=most + 1),
        good._replace(grid=(0, 1, 1)),
        good._replace(grid=(2**31, 1, 1)),
    ):
        assert faults(launch, code, most), launch
    assert faults(good, code._replace(registers=169), most)
