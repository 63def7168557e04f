"""The types that csrc/python/tensor_exchange.h declares by hand have the layout of those in torch's headers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]

SOURCE = """
#include <ATen/dlpack.h>

#include <cstddef>

#include "python/tensor_exchange.h"

using namespace fused_attn;

#define SAME(ours, our_field, theirs, their_field)                        \\
  static_assert(offsetof(ours, our_field) == offsetof(theirs, their_field) && \\
                sizeof(ours::our_field) == sizeof(theirs::their_field), #our_field)
SAME(ExchangeTensor, data, DLTensor, data);
SAME(ExchangeTensor, device, DLTensor, device.device_type);
SAME(ExchangeTensor, device_index, DLTensor, device.device_id);
SAME(ExchangeTensor, ndim, DLTensor, ndim);
SAME(ExchangeTensor, code, DLTensor, dtype.code);
SAME(ExchangeTensor, bits, DLTensor, dtype.bits);
SAME(ExchangeTensor, lanes, DLTensor, dtype.lanes);
SAME(ExchangeTensor, shape, DLTensor, shape);
SAME(ExchangeTensor, strides, DLTensor, strides);
SAME(ExchangeTensor, byte_offset, DLTensor, byte_offset);
static_assert(sizeof(ExchangeTensor) == sizeof(DLTensor));

SAME(ExchangeApi, major, DLPackExchangeAPI, header.version.major);
SAME(ExchangeApi, minor, DLPackExchangeAPI, header.version.minor);
SAME(ExchangeApi, previous, DLPackExchangeAPI, header.prev_api);
SAME(ExchangeApi, make_tensor, DLPackExchangeAPI, managed_tensor_allocator);
SAME(ExchangeApi, own_tensor, DLPackExchangeAPI, managed_tensor_from_py_object_no_sync);
SAME(ExchangeApi, wrap_tensor, DLPackExchangeAPI, managed_tensor_to_py_object_no_sync);
SAME(ExchangeApi, read_tensor, DLPackExchangeAPI, dltensor_from_py_object_no_sync);
SAME(ExchangeApi, current_stream, DLPackExchangeAPI, current_work_stream);
static_assert(sizeof(ExchangeApi) == sizeof(DLPackExchangeAPI));

#define EQUAL(ours, theirs) static_assert(static_cast<int>(ours) == static_cast<int>(theirs), #theirs)
EQUAL(ExchangeDevice::kCpu, kDLCPU);
EQUAL(ExchangeDevice::kCuda, kDLCUDA);
EQUAL(ExchangeDevice::kCudaHost, kDLCUDAHost);
EQUAL(ExchangeCode::kInt, kDLInt);
EQUAL(ExchangeCode::kUInt, kDLUInt);
EQUAL(ExchangeCode::kFloat, kDLFloat);
EQUAL(ExchangeCode::kBFloat, kDLBfloat);
EQUAL(ExchangeCode::kBool, kDLBool);
static_assert(DLPACK_MAJOR_VERSION == 1);
"""


def check_syntax(source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What the compiler says about the source. It evaluates each static_assert, and generates no code."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    torch_headers = Path(torch.__file__).parent / "include"
    if compiler is None or not (torch_headers / "ATen" / "dlpack.h").exists():
        pytest.skip("needs a C++ compiler and torch's headers")
    pybind11 = pytest.importorskip("pybind11", reason="needs the Python package pybind11")
    includes = [ROOT / "csrc", torch_headers, pybind11.get_include(), sysconfig.get_path("include")]
    path = folder / "layout.cpp"
    path.write_text(source)
    command = [compiler, "-std=c++17", "-fsyntax-only", *(f"-I{include}" for include in includes), str(path)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_layout_is_that_of_torch(tmp_path: Path) -> None:
    result = check_syntax(SOURCE, tmp_path)
    assert result.returncode == 0, result.stderr


def test_another_layout_is_noticed(tmp_path: Path) -> None:
    swapped = SOURCE.replace("ExchangeTensor, bits, DLTensor, dtype.bits", "ExchangeTensor, bits, DLTensor, dtype.code")
    result = check_syntax(swapped, tmp_path)
    assert result.returncode != 0 and "bits" in result.stderr
