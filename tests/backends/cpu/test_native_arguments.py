"""The native module checks every tensor of a call, because a kernel trusts its parameters."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_attn.attention.inputs import Gradients, Inputs, Saved

_C = pytest.importorskip("fused_attn._C", reason="the native extension is not built", exc_type=ImportError)

pytestmark = pytest.mark.quick

B, H, HKV, L, S, D, DV = 2, 4, 2, 5, 7, 8, 6

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("fields", [Inputs, Gradients, Saved])
def test_python_and_cpp_name_the_same_tensors_in_the_same_order(fields: Any) -> None:
    """Tensors of one dtype and shape would change places without an error."""
    text = (ROOT / "csrc" / "python" / "inputs.h").read_text()
    struct = re.search(rf"struct {fields.__name__} {{\n  PyObject (.*?);", text, re.DOTALL)
    assert struct is not None
    assert re.findall(r"\w+", struct[1]) == list(fields._fields)


def call() -> dict[str, Any]:
    """A right backward call with all tensors, by name. `run` makes it."""
    lengths = {"query": (B, H, L, D), "key": (B, HKV, S, D), "value": (B, HKV, S, DV), "out": (B, H, L, DV)}
    tensors = {name: torch.randn(shape) for name, shape in lengths.items()}
    tensors |= {
        "bias": torch.randn(B, H, L, S),
        "key_bias": torch.randn(B, S),
        "relative_bias": torch.randn(H, L + S - 1),
        "sinks": torch.randn(H),
    }
    tensors |= {f"d{name}": torch.empty_like(x) for name, x in tensors.items()}
    tensors |= {
        "lse": torch.zeros(B, H, L),
        "row_max": torch.zeros(B, H, L),
        "dlse": torch.randn(B, H, L),
        "seed": torch.tensor(3),
    }
    tensors |= {"mask": torch.ones(B, H, L, S, dtype=torch.bool), "key_padding": torch.zeros(B, S, dtype=torch.bool)}
    tensors |= {"key_ranges": torch.ones(B, H, L, 2, 2, dtype=torch.int32)}
    tensors |= {"key_lengths": torch.tensor([S, 3], dtype=torch.int32), "block_table": None}
    return tensors | {"cu_seqlens_q": None, "cu_seqlens_k": None}


def packed_call() -> dict[str, Any]:
    tensors = dict.fromkeys(call())
    shapes = {"query": (9, H, D), "key": (8, HKV, D), "value": (8, HKV, DV), "out": (9, H, DV)}
    tensors |= {name: torch.randn(shape) for name, shape in shapes.items()}
    tensors |= {"dout": torch.randn(9, H, DV), "lse": torch.zeros(H, 9), "row_max": None}
    return tensors | {"cu_seqlens_q": torch.tensor([0, 4, 9]).int(), "cu_seqlens_k": torch.tensor([0, 5, 8]).int()}


def run(tensors: dict[str, Any]) -> None:
    inputs = Inputs(*(tensors[name] for name in Inputs._fields))
    saved = Saved(*(tensors[name] for name in Saved._fields))
    gradients = Gradients(*(tensors[f"d{name}"] for name in Gradients._fields))
    config = _C.Config(scale=0.3, dropout_p=0.1 if tensors["seed"] is not None else 0.0, max_seqlen_q=5, max_seqlen_k=5)
    _C.forward(inputs, (saved.out, saved.lse, tensors["row_max"]), config, 1)
    _C.backward(inputs, saved, gradients, config, 1)


def test_right_calls_run() -> None:
    run(call())
    run(packed_call())


NAMES = [name for name, x in call().items() if x is not None]


@pytest.mark.parametrize("name", NAMES)
def test_dtype(name: str) -> None:
    tensors = call()
    tensors[name] = tensors[name].to(torch.int16)
    with pytest.raises(ValueError, match=f"^{name}: expected (float32|bool|int32|int64).*, got another type"):
        run(tensors)


@pytest.mark.parametrize("name", NAMES)
def test_number_of_dimensions(name: str) -> None:
    tensors = call()
    tensors[name] = tensors[name][None]
    with pytest.raises(ValueError, match=f"^{name}: expected (4 dimensions|.*shape).*, got "):
        run(tensors)


# query defines the sizes, and a query may have any number of ranges.
FREE = [*(("query", dim) for dim in range(4)), ("key_ranges", 3)]
SIZES = [(name, dim) for name, x in call().items() if x is not None for dim in range(x.ndim) if (name, dim) not in FREE]


@pytest.mark.parametrize(("name", "dim"), SIZES)
def test_size(name: str, dim: int) -> None:
    """One size is larger by one. An error names a tensor, though perhaps the other one that must have the same size."""
    tensors = call()
    x = tensors[name]
    tensors[name] = torch.zeros([*x.shape[:dim], x.shape[dim] + 1, *x.shape[dim + 1 :]], dtype=x.dtype)
    with pytest.raises(ValueError, match=r"^\w+: expected .*, got "):
        run(tensors)


@pytest.mark.parametrize("name", ["query", "key", "value", "out", "dout", "dquery", "dkey", "dvalue", "lse", "row_max"])
def test_stride_of_the_last_dimension(name: str) -> None:
    tensors = call()
    tensors[name] = torch.zeros(*tensors[name].shape, 2)[..., 0]
    with pytest.raises(ValueError, match=rf"^{name}: expected stride 1 in dimension \d, got stride 2"):
        run(tensors)


@pytest.mark.parametrize("name", ["out", "query", "dout"])
def test_none(name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name}: expected a torch.Tensor, got NoneType"):
        run(call() | {name: None})


def test_backward_needs_lse() -> None:
    with pytest.raises(TypeError, match=r"^lse: expected a torch.Tensor, got NoneType"):
        run(call() | {"lse": None})


@pytest.mark.parametrize("name", ["bias", "key_bias", "relative_bias", "sinks"])
def test_a_gradient_needs_its_input(name: str) -> None:
    with pytest.raises(ValueError, match=f"^d{name}: expected None, as {name} is None"):
        run(call() | {name: None})


def offsets(*values: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("cu_seqlens_q", lambda: None),
        ("cu_seqlens_k", lambda: None),
        ("cu_seqlens_q", lambda: torch.tensor([0, 4, 9])),
        ("cu_seqlens_k", lambda: torch.zeros(3, 2, dtype=torch.int32)[:, 0]),
        ("cu_seqlens_q", lambda: torch.zeros(3, 1, dtype=torch.int32)),
        ("cu_seqlens_k", offsets(0, 8)),
        ("cu_seqlens_q", offsets(0, 4, 10)),
        ("cu_seqlens_k", offsets(-1, 4, 8)),
        ("cu_seqlens_k", offsets(4, 3, 8)),
        ("cu_seqlens_q", offsets(0, 3, 9)),
    ],
)
def test_offsets(name: str, make: Callable[[], torch.Tensor | None]) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        run(packed_call() | {name: make()})


@pytest.mark.parametrize("name", ["query", "key", "value", "out", "dout", "lse"])
def test_packed_rows_have_no_batch_dimension(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected (3 dimensions|shape \(.*\)), got "):
        run(packed_call() | {name: packed_call()[name][None]})


def paged_call() -> dict[str, Any]:
    tensors = dict.fromkeys(call())
    shapes = {"query": (B, H, L, D), "key": (6, 4, HKV, D), "value": (6, 4, HKV, DV), "out": (B, H, L, DV)}
    tensors |= {name: torch.randn(shape) for name, shape in shapes.items()}
    return tensors | {"key_lengths": torch.tensor([8, 5]).int(), "block_table": torch.tensor([[0, 5], [2, 3]]).int()}


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("key_lengths", lambda: torch.tensor([9, 5]).int()),
        ("key_lengths", lambda: torch.tensor([-1, 5]).int()),
        ("key_lengths", lambda: torch.tensor([8, 5, 5]).int()),
        ("key_lengths", lambda: torch.tensor([8, 5])),
        ("block_table", lambda: torch.tensor([[0, 6], [2, 3]]).int()),
        ("block_table", lambda: torch.tensor([[0, 5], [-1, 3]]).int()),
        ("block_table", lambda: torch.tensor([[0, 5]]).int()),
        ("block_table", lambda: torch.tensor([[0, 5], [2, 3]])),
        ("block_table", lambda: torch.tensor([[0, 5], [2, 3]]).int().T.contiguous().T),
        ("key", lambda: torch.randn(6, 0, HKV, D)),
        ("value", lambda: torch.randn(5, 4, HKV, DV)),
    ],
)
def test_pages(name: str, make: Callable[[], torch.Tensor]) -> None:
    def run_forward(tensors: dict[str, Any]) -> None:
        inputs = Inputs(*(tensors[field] for field in Inputs._fields))
        _C.forward(inputs, (tensors["out"], None, None), _C.Config(scale=0.3), 1)

    run_forward(paged_call())
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        run_forward(paged_call() | {name: make()})
    with pytest.raises(ValueError, match=r"^block_table: expected None, as key_lengths is None"):
        run_forward(paged_call() | {"key_lengths": None})


def test_a_key_has_a_number_of_32_bits() -> None:
    """All keys are the same row of memory."""
    key, value = torch.zeros(1, 1, 1, D).expand(1, 1, 2**31, D), torch.zeros(1, 1, 1, DV).expand(1, 1, 2**31, DV)
    tensors = dict.fromkeys(Inputs._fields) | {"query": torch.zeros(1, 1, 1, D), "key": key, "value": value}
    with pytest.raises(ValueError, match=r"^key: expected at most 2147483647 keys, got 2147483648"):
        _C.forward(Inputs(**tensors), (torch.zeros(1, 1, 1, DV), None, None), _C.Config(scale=0.3), 1)


@pytest.mark.parametrize("position", range(8))
def test_the_small_module_checks_its_tensors(position: int) -> None:
    def arguments() -> list[torch.Tensor]:
        shapes = (2, 3, 8), (24, 8), (24,), (8, 8), (8,), (2, 3, 8)
        norm = (None, None, 0.0, False)
        return [*map(torch.randn, shapes), 2, torch.zeros(2, 3, dtype=torch.bool), False, *norm, 1]

    _C.self_attention(*arguments())
    names = "x", "in_weight", "in_bias", "out_weight", "out_bias", "out", "num_heads", "key_padding"
    if names[position] == "num_heads":
        with pytest.raises(ValueError, match=r"^num_heads: expected a divisor of 8, got 3"):
            _C.self_attention(*(3 if i == position else x for i, x in enumerate(arguments())))
        return
    x = arguments()[position]
    wrong = [x.to(torch.int16), x[None]]
    if names[position] != "key_padding":
        wrong.append(torch.zeros(*x.shape, 2)[..., 0])
    for y in wrong:
        with pytest.raises(ValueError, match=f"^{names[position]}: expected .*, got "):
            _C.self_attention(*(y if i == position else x for i, x in enumerate(arguments())))


@pytest.mark.parametrize("shape", [(B, H, L, S), (1, H, L, S), (B, 1, L, S), (B, H, 1, S), (B, H, L, 1)])
def test_a_sum_in_dbias_is_not_rounded(shape: tuple[int, ...]) -> None:
    tensors = call()
    for name in ("query", "key", "value", "out"):
        tensors[name] = tensors[name].bfloat16()
        tensors[f"d{name}"] = torch.empty_like(tensors[name])
    tensors |= {"bias": torch.randn(shape).bfloat16(), "dbias": torch.empty(shape)}
    run(tensors)
    tensors["dbias"] = torch.empty(shape, dtype=torch.bfloat16)
    if shape == (B, H, L, S):
        run(tensors)
    else:
        with pytest.raises(ValueError, match=r"^dbias: expected the accumulate dtype"):
            run(tensors)
