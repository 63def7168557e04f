"""Which device is current after a call, and which errors last.

csrc/cuda/runtime_gpu.h runs on a machine with four GPUs, which headers in the place of CUDA's own make up.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from emulator import CSRC, why_unavailable

DRIVER = """
#pragma once
enum CUresult { CUDA_SUCCESS, CUDA_ERROR_UNKNOWN };
extern "C" CUresult cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* is_active);
"""

RUNTIME = """
#pragma once
#define CUDART_VERSION 13000
enum cudaError_t { cudaSuccess, cudaErrorOther, ERRORS };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
constexpr int cudaEnableDefault = 0;

// As with CUDA 12 and later, a context is created on the device that becomes current.
struct Machine {
  int current;
  bool has_context[4];
  int broken = -1;  // the device that cannot become current
  bool is_driver_old = false;
  cudaError_t failure = cudaErrorOther;  // of a device that cannot become current
  cudaError_t last = cudaSuccess;
};
inline Machine machine;

inline const char* cudaGetErrorString(cudaError_t) { return "broken"; }
inline cudaError_t cudaGetLastError() {
  const cudaError_t last = machine.last;
  machine.last = cudaSuccess;
  return last;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = machine.current;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  machine.current = device;
  if (device == machine.broken) return machine.last = machine.failure;
  machine.has_context[device] = true;
  return cudaSuccess;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, int,
                                                    cudaDriverEntryPointQueryResult* result) {
  if (machine.is_driver_old || name != std::string("cuDevicePrimaryCtxGetState")) {
    *result = cudaDriverEntryPointSymbolNotFound;
    return machine.last = cudaErrorOther;
  }
  *function = reinterpret_cast<void*>(cuDevicePrimaryCtxGetState);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
"""

#: The errors that stay for as long as a process runs: its driver, its GPU or the binary would have to change.
LASTING = (
    "InitializationError",
    "StubLibrary",
    "InsufficientDriver",
    "CallRequiresNewerDriver",
    "InvalidDeviceFunction",
    "NoDevice",
    "InvalidDevice",
    "InvalidKernelImage",
    "NoKernelImageForDevice",
    "InvalidPtx",
    "JitCompilerNotFound",
    "UnsupportedPtxVersion",
    "JitCompilationDisabled",
    "SystemDriverMismatch",
    "CompatNotSupportedOnDevice",
)
#: The others that the product or a test names.
PASSING = ("MemoryAllocation", "DevicesUnavailable", "IllegalAddress")
ERRORS = ("Other", *LASTING, *PASSING)  # as cudaError_t numbers them, from 1 on

#: The arguments are the fields of a Machine, and the device of the guard. It prints what the guard has
#: thrown, and how it leaves the machine.
PROGRAM = """
#include <cstdio>
#include <string>

#include "cuda/runtime_gpu.h"

CUresult cuDevicePrimaryCtxGetState(int device, unsigned*, int* is_active) {
  *is_active = machine.has_context[device];
  return CUDA_SUCCESS;
}

int main(int, char** arguments) {
  machine.current = std::stoi(arguments[1]);
  for (int i = 0; i < 4; ++i) machine.has_context[i] = std::string(arguments[2]).find('0' + i) != std::string::npos;
  machine.broken = std::stoi(arguments[3]);
  machine.is_driver_old = std::stoi(arguments[4]) != 0;
  const int device = std::stoi(arguments[5]);
  machine.failure = static_cast<cudaError_t>(std::stoi(arguments[6]));
  try {
    const fused_attn::gpu::DeviceGuard guard(device);
    if (machine.current != device || !machine.has_context[device]) return 1;
    if (machine.broken == -2) machine.broken = std::stoi(arguments[1]);
  } catch (const fused_attn::gpu::LastingError& error) {
    std::printf("lasting: %s; ", error.what());
  } catch (const fused_attn::gpu::OutOfMemory& error) {
    std::printf("memory: %s; ", error.what());
  } catch (const std::runtime_error& error) {
    std::printf("%s; ", error.what());
  }
  std::printf("current %d, contexts", machine.current);
  for (int i = 0; i < 4; ++i) {
    if (machine.has_context[i]) std::printf(" %d", i);
  }
  std::printf(", error %d", machine.last);
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := why_unavailable():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("guard")
    (folder / "cuda.h").write_text(DRIVER)
    names = ", ".join(f"cudaError{name}" for name in (*LASTING, *PASSING))
    (folder / "cuda_runtime.h").write_text(RUNTIME.replace("ERRORS", names))
    (folder / "guard.cpp").write_text(PROGRAM)
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{folder}", f"-I{CSRC}"]
    subprocess.run(["g++", *flags, "-include", "string", folder / "guard.cpp", "-o", folder / "guard"], check=True)
    return folder / "guard"


BREAKS_MEANWHILE = -2


@pytest.mark.parametrize(
    ("current", "contexts", "broken", "is_driver_old", "device", "after"),
    [
        pytest.param(1, "1", -1, False, 1, "current 1, contexts 1, error 0", id="current-already"),
        pytest.param(1, "-", -1, False, 1, "current 1, contexts 1, error 0", id="first-use"),
        pytest.param(0, "03", -1, False, 2, "current 0, contexts 0 2 3, error 0", id="restored"),
        pytest.param(0, "2", -1, False, 2, "current 2, contexts 2, error 0", id="no-context-before"),
        pytest.param(0, "2", -1, True, 2, "current 0, contexts 0 2, error 0", id="old-driver"),
        pytest.param(0, "0", 2, False, 2, "broken; current 0, contexts 0, error 0", id="device-broken"),
        pytest.param(0, "0", BREAKS_MEANWHILE, False, 2, "current 0, contexts 0 2, error 0", id="device-before-breaks"),
    ],
)
def test_the_current_device_afterwards(
    current: int, contexts: str, broken: int, is_driver_old: bool, device: int, after: str, program: Path
) -> None:
    """No other device gets a context, unless the driver cannot say whether it has one. No error is left for the next
    launch to report.
    """
    arguments = map(str, (current, contexts, broken, int(is_driver_old), device, 1))
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, after)


@pytest.mark.parametrize("error", ERRORS)
def test_which_errors_last(error: str, program: Path) -> None:
    """Python keeps the answer that a GPU cannot run the kernels only if it is a lasting one."""
    done = subprocess.run(
        [program, "0", "0", "2", "0", "2", str(1 + ERRORS.index(error))], capture_output=True, text=True, check=True
    )
    kind = "lasting: " if error in LASTING else "memory: CUDA " if error == "MemoryAllocation" else ""
    assert done.stdout.startswith(f"{kind}broken")
    assert done.stdout.endswith("; current 0, contexts 0, error 0")
