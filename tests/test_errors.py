"""A wrong argument raises an exception that names the argument, what was expected, and what the caller passed."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import fused_attn
from fused_attn.attention import masks
from fused_attn.backends import dispatch
from fused_attn.distributed import (
    AttentionParallel,
    context_parallel_attention,
    context_parallel_attention_varlen,
    shard_batch,
    shard_positions,
    shard_sequence,
    tensor_parallel_plan,
    unshard_sequence,
)
from fused_attn.integrations.torchtitan import VarlenAttention
from fused_attn.partial import attention_partial

pytestmark = pytest.mark.quick

Q = torch.zeros(2, 4, 5, 8)
KV = torch.zeros(2, 4, 7, 8)
META = torch.device("meta")


def call(query=Q, key=KV, value=KV, *args, **options):
    return lambda: fused_attn.fused_attention(query, key, value, *args, **options)


TABLE = {
    "query-no-tensor": (call(query=[1.0]), TypeError, r"query: expected a torch\.Tensor, got list"),
    "key-none": (call(key=None), TypeError, r"key: expected a torch\.Tensor, got NoneType None"),
    "value-float": (call(value=1.5), TypeError, r"value: expected a torch\.Tensor, got float 1\.5"),
    "query-int": (call(query=Q.int()), TypeError, r"query: expected a floating-point dtype, got torch\.int32"),
    "query-complex": (
        call(query=Q.cfloat()),
        TypeError,
        r"query: expected a floating-point dtype, got torch\.complex64",
    ),
    "query-float8": (
        call(*[x.to(torch.float8_e4m3fn) for x in (Q, KV, KV)]),
        TypeError,
        r"query: expected one of torch\.float16, .*torch\.float64, got torch\.float8_e4m3fn",
    ),
    "query-sparse": (
        call(query=Q.to_sparse()),
        TypeError,
        r"query: expected a dense tensor, got layout torch\.sparse_coo",
    ),
    "key-sparse-csr": (call(key=KV.to_sparse_csr()), TypeError, r"key: expected a dense tensor, got .*sparse_csr"),
    "value-sparse": (call(value=KV.to_sparse()), TypeError, r"value: expected a dense tensor, got .*sparse_coo"),
    "query-mkldnn": (call(query=Q.to_mkldnn()), TypeError, r"query: expected a dense tensor, got .*_mkldnn"),
    "key-dtype": (
        call(key=KV.half()),
        TypeError,
        r"key: expected the dtype of query, torch\.float32, got torch\.float16",
    ),
    "value-dtype": (
        call(value=KV.double()),
        TypeError,
        r"value: expected the dtype of query, torch\.float32, got torch\.float64",
    ),
    "key-device": (call(key=KV.to(META)), ValueError, r"key: expected the device of query, cpu, got meta"),
    "query-1d": (call(query=Q[0, 0, 0]), ValueError, r"query: expected at least 2 dimensions, got shape \(8,\)"),
    "key-head-dim": (
        call(key=KV[..., :5]),
        ValueError,
        r"key: expected the head dim of query, 8, got shape \(2, 4, 7, 5\)",
    ),
    "head-dim-0": (call(query=Q[..., :0], key=KV[..., :0]), ValueError, r"query: expected a head dim of at least 1"),
    "value-length": (
        call(value=KV[:, :, :6]),
        ValueError,
        r"value: expected the length of key, 7, got shape \(2, 4, 6, 8\)",
    ),
    "batch": (
        call(key=torch.zeros(3, 4, 7, 8), value=torch.zeros(3, 4, 7, 8)),
        ValueError,
        r"query, key, value: expected batch dimensions that broadcast, got shapes \(2, 4, 5, 8\), \(3, 4, 7, 8\)",
    ),
    "heads": (
        call(key=KV[:, :2], value=KV[:, :2]),
        ValueError,
        r"key: expected 4 heads; enable_gqa=True .* got 2 heads",
    ),
    "gqa-heads": (
        call(key=KV[:, :3], value=KV[:, :3], enable_gqa=True),
        ValueError,
        r"key: expected a number of heads that divides the 4 of query .* got 3 heads",
    ),
    "gqa-value-heads": (
        call(key=KV[:, :2], enable_gqa=True),
        ValueError,
        r"value: expected as many heads as key, 2, got 4",
    ),
    "mask-dtype": (
        call(attn_mask=torch.zeros(5, 7, dtype=torch.long)),
        TypeError,
        r"attn_mask: expected bool \(True = attend\) or floating point \(added\), got torch\.int64",
    ),
    "mask-shape": (
        call(attn_mask=torch.zeros(5, 6)),
        ValueError,
        r"attn_mask: expected a shape broadcastable to \(\.\.\., H, L, S\) = \(2, 4, 5, 7\), got shape \(5, 6\)",
    ),
    "mask-without-heads": (
        call(attn_mask=torch.zeros(2, 5, 7)),
        ValueError,
        r"got shape \(2, 5, 7\); mask.unsqueeze\(-3\) gives it a dimension for heads$",
    ),
    "mask-of-keys": (
        call(attn_mask=torch.zeros(2, 7)),
        ValueError,
        r"got shape \(2, 7\); a mask of keys is a key_padding_mask, where True = ignore$",
    ),
    "mask-rank": (call(attn_mask=torch.zeros(1, 2, 4, 5, 7)), ValueError, r"attn_mask: expected a shape broadcastable"),
    "mask-float8": (
        call(attn_mask=torch.zeros(5, 7).to(torch.float8_e5m2)),
        TypeError,
        r"attn_mask: expected one of torch\.float16, .* got torch\.float8_e5m2",
    ),
    "mask-device": (
        call(attn_mask=torch.zeros(5, 7, device=META)),
        ValueError,
        r"attn_mask: expected the device of query",
    ),
    "mask-no-tensor": (call(attn_mask="causal"), TypeError, r"attn_mask: expected a torch\.Tensor, got str 'causal'"),
    "padding-shape": (
        call(key_padding_mask=torch.zeros(7, dtype=torch.bool)),
        ValueError,
        r"key_padding_mask: expected shape \(B, S\) = \(2, 7\), got shape \(7,\)",
    ),
    "padding-dtype": (
        call(key_padding_mask=torch.zeros(2, 7, dtype=torch.uint8)),
        TypeError,
        r"key_padding_mask: expected bool \(True = ignore\) or floating point \(added\), got torch\.uint8",
    ),
    "padding-float8": (
        call(key_padding_mask=torch.zeros(2, 7).to(torch.float8_e5m2)),
        TypeError,
        r"key_padding_mask: expected one of torch\.float16, .* got torch\.float8_e5m2",
    ),
    "padding-no-tensor": (
        call(key_padding_mask=[[True] * 7] * 2),
        TypeError,
        r"key_padding_mask: expected a torch\.Tensor",
    ),
    "dropout-range": (call(dropout_p=1.5), ValueError, r"dropout_p: expected a probability in \[0, 1\], got 1\.5"),
    "dropout-negative": (call(dropout_p=-0.1), ValueError, r"dropout_p: expected a probability"),
    "dropout-nan": (
        call(dropout_p=float("nan")),
        ValueError,
        r"dropout_p: expected a probability in \[0, 1\], got nan",
    ),
    "dropout-type": (call(dropout_p="0.1"), TypeError, r"dropout_p: expected a number, got str '0\.1'"),
    "causal-type": (call(is_causal=1), TypeError, r"is_causal: expected a bool, got int 1"),
    "scale-type": (call(scale="auto"), TypeError, r"scale: expected a number, got str 'auto'"),
    "scale-huge": (call(scale=10**400), ValueError, r"scale: expected a finite number, got 1000"),
    "softcap-huge": (call(softcap=10**400), ValueError, r"softcap: expected a finite number >= 0"),
    "scale-tensor": (call(scale=torch.tensor(1.0)), TypeError, r"scale: expected a number, got torch.Tensor"),
    "softcap-negative": (
        call(softcap=-1.0),
        ValueError,
        r"softcap: expected a finite number >= 0 \(0 = off\), got -1\.0",
    ),
    "softcap-beyond-float32": (
        call(softcap=1e39),
        ValueError,
        r"softcap: expected 0 \(off\), or 1\.18e-38 to 3\.40e\+38",
    ),
    "softcap-below-float32": (
        call(softcap=1e-46),
        ValueError,
        r"softcap: expected 0 .* for torch.float32 tensors, got",
    ),
    "scale-beyond-float32": (call(scale=-1e39), ValueError, r"scale: expected a number from -3\.40e\+38 to 3\.40e\+38"),
    "softcap-infinite": (call(softcap=float("inf")), ValueError, r"softcap: expected a finite number >= 0"),
    "window-length": (
        call(window_size=(1, 2, 3)),
        ValueError,
        r"window_size: expected \(left, right\), two ints >= -1 .* got \(1, 2, 3\)",
    ),
    "window-str": (call(window_size="12"), ValueError, r"window_size: expected \(left, right\), .* got '12'"),
    "window-negative": (call(window_size=(-2, 0)), ValueError, r"window_size: expected \(left, right\)"),
    "window-float": (call(window_size=(1.5, 0)), ValueError, r"window_size: expected \(left, right\)"),
    "alignment-other": (
        call(diagonal_alignment="bottom_right"),
        ValueError,
        r"diagonal_alignment: expected 'upper_left' or 'lower_right', got 'bottom_right'",
    ),
    "alignment-none": (call(diagonal_alignment=None), TypeError, r"diagonal_alignment: expected a string, got None"),
    "alignment-against-bias": (
        call(attn_mask=causal_upper_left(5, 7), diagonal_alignment="lower_right"),
        ValueError,
        r"diagonal_alignment: expected 'upper_left' with an upper-left causal bias as attn_mask, .* got 'lower_right'",
    ),
    "window-int": (call(window_size=4), (TypeError, ValueError), r"window_size: expected \(left, right\).* got .*4"),
    "relative-shape": (
        call(relative_bias=torch.zeros(4, 12)),
        ValueError,
        r"relative_bias: expected shape \(H, L \+ S - 1\) = \(4, 11\) or \(L \+ S - 1,\) = \(11,\), got shape",
    ),
    "relative-dtype": (
        call(relative_bias=torch.zeros(11, dtype=torch.long)),
        TypeError,
        r"relative_bias: expected a floating-point",
    ),
    "relative-float8": (
        call(relative_bias=torch.zeros(11).to(torch.float8_e5m2)),
        TypeError,
        r"relative_bias: expected one of torch\.float16, .* got torch\.float8_e5m2",
    ),
    "sinks-float8": (
        call(sinks=torch.zeros(4).to(torch.float8_e5m2)),
        TypeError,
        r"sinks: expected one of torch\.float16, .* got torch\.float8_e5m2",
    ),
    "sinks-shape": (call(sinks=torch.zeros(3)), ValueError, r"sinks: expected shape \(H,\) = \(4,\), got shape \(3,\)"),
    "sinks-no-tensor": (call(sinks=0.0), TypeError, r"sinks: expected a torch\.Tensor, got float 0\.0"),
    "seed-negative": (
        call(dropout_p=0.5, dropout_seed=-1),
        ValueError,
        r"dropout_seed: expected 0 <= seed < 2\*\*63, got -1",
    ),
    "seed-huge": (call(dropout_p=0.5, dropout_seed=2**63), ValueError, r"dropout_seed: expected 0 <= seed < 2\*\*63"),
    "seed-float": (
        call(dropout_p=0.5, dropout_seed=1.0),
        TypeError,
        r"dropout_seed: expected an int or a 0-d int64 tensor, got float 1\.0",
    ),
    "seed-tensor": (
        call(dropout_p=0.5, dropout_seed=torch.zeros(2)),
        ValueError,
        r"dropout_seed: expected an int or a 0-d int64 tensor, got torch\.float32 of shape \(2,\)",
    ),
    "backend-unknown": (
        call(backend="cudnn"),
        ValueError,
        r"backend: expected None or one of \('cpu', .*'reference'\), got 'cudnn'",
    ),
}


TABLE |= {
    f"{name}-{value!r}": (call(**{name: value}), TypeError, rf"{name}: expected a bool, got {re.escape(described)}")
    for name in ("is_causal", "enable_gqa", "return_lse", "return_max")
    for value, described in (("no", "str 'no'"), (1, "int 1"), (0, "int 0"), (None, "NoneType None"), ([], "list"))
}
TABLE |= {
    f"seed-without-dropout-{value!r}": (
        call(dropout_seed=value),
        TypeError,
        rf"dropout_seed: expected an int or a 0-d int64 tensor, got {re.escape(described)}",
    )
    for value, described in (("abc", "str 'abc'"), (1.5, "float 1.5"), (True, "bool True"), ([1], "list"))
}
TABLE |= {
    "seed-without-dropout-range": (call(dropout_seed=-1), ValueError, r"dropout_seed: expected 0 <= seed < 2\*\*63"),
    "seed-without-dropout-mask": (
        call(dropout_seed="abc", is_causal=True, key_padding_mask=torch.zeros(2, 7, dtype=torch.bool)),
        TypeError,
        r"dropout_seed: expected an int",
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_fused_attention(name: str) -> None:
    function, exception, message = TABLE[name]
    with pytest.raises(exception, match=message):
        function()


@pytest.mark.parametrize("name", ["return_lse", "return_max", "dropout_seed"])
def test_a_wrong_value_is_told_after_a_right_call_of_the_same_shapes(name: str) -> None:
    """The plan of the right call is cached. The wrong call must not find the plan."""
    value = "no"
    calls = [call, varlen] if name != "return_lse" else [call, varlen, paged]
    for function in calls:
        function()()
        with pytest.raises(TypeError, match=f"{name}: expected .*, got str 'no'"):
            function(**{name: value})()
    with pytest.raises(TypeError, match=f"{name}: expected .*, got str 'no'"):
        fused_attn.explain(Q, KV, KV, **{name: value})


def test_bools_and_ints_of_numpy_are_taken() -> None:
    yes, no = np.bool_(True), np.bool_(False)
    out, lse = call(return_lse=yes, return_max=no, is_causal=yes, enable_gqa=no)()
    expected, expected_lse = call(return_lse=True, is_causal=True)()
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    seeded = call(dropout_p=0.5, dropout_seed=np.int64(7))()
    assert torch.equal(seeded, call(dropout_p=0.5, dropout_seed=7)())
    call(
        dropout_p=np.float32(0.5), scale=np.float64(0.1), num_splits=np.int64(2), window_size=(np.int64(1), np.int32(0))
    )()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["scale", "softcap"])
@pytest.mark.parametrize("number", [np.float16, np.float32])
def test_infinite_numbers_of_numpy_are_refused(name: str, number: type) -> None:
    call(**{name: number(0.5)})()
    query = Q.double()  # for float32 tensors, the limit of float32 would refuse the number
    with pytest.raises(ValueError, match=f"{name}: expected a finite number"):
        fused_attn.fused_attention(query, query, query, **{name: number("inf")})


def test_explain_answers_for_meta_tensors() -> None:
    query, padding = Q.to(META), torch.zeros(2, 5, dtype=torch.bool, device=META)
    explanation = fused_attn.explain(query, query, query, is_causal=True, key_padding_mask=padding)
    assert explanation.chosen == "reference"
    assert explanation.problem.device == META
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused_attn.explain(query, query, query).problem.dtype == torch.float32
        assert fused_attn.fused_attention(query, query, query).dtype == torch.float32


#: (B, L, H, D) = (2, 8, 4, 16) and (B, S, H, D) = (2, 10, 4, 16)
BLHD, BSHD = torch.zeros(2, 8, 4, 16), torch.zeros(2, 10, 4, 16)
TRANSPOSED = {
    "heads": (call(BLHD, BSHD, BSHD), r"query: expected 10 heads, got 8"),
    "heads-3d": (call(BLHD[0], BSHD[0], BSHD[0]), r"query: expected 10 heads, got 8"),
    "heads-divide": (call(BSHD, BSHD[:, :5], BSHD[:, :5]), r"key: expected 10 heads; enable_gqa=True"),
    "gqa-heads": (
        call(BLHD, BSHD[:, :, :2], BSHD[:, :, :2], enable_gqa=True),
        r"key: expected a number of heads that divides the 8 of query",
    ),
    "gqa-forgotten": (
        call(BLHD, BSHD[:, :, :2], BSHD[:, :, :2]),
        r"query: expected 10 heads, got 8 heads; .* makes \(B, H, L, D\), with enable_gqa=True",
    ),
    "mask": (call(BLHD, BLHD, BLHD, torch.zeros(8, 8)), r"attn_mask: expected a shape broadcastable"),
    "padding": (
        call(BLHD, BLHD, BLHD, key_padding_mask=torch.zeros(2, 8).bool()),
        r"key_padding_mask: expected shape \(B, S\) = \(2, 4\)",
    ),
    "relative": (call(BLHD, BLHD, BLHD, relative_bias=torch.zeros(4, 15)), r"relative_bias: expected shape"),
    "sinks": (call(BLHD, BLHD, BLHD, sinks=torch.zeros(4)), r"sinks: expected shape \(H,\) = \(8,\)"),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_heads_and_rows_that_changed_places_are_told(name: str) -> None:
    function, message = TRANSPOSED[name]
    with pytest.raises(ValueError, match=message) as raised:
        function()
    assert "; these shapes would fit as (B, L, H, D), which x.transpose(-3, -2) makes (B, H, L, D)" in str(raised.value)


@pytest.mark.parametrize(
    "function",
    [
        call(BLHD, BSHD[:, :, :3], BSHD[:, :, :3]),  # wrong in either layout
        # These shapes would fit with heads and rows exchanged, but more likely the caller forgot enable_gqa=True.
        call(torch.zeros(2, 8, 64, 16), torch.zeros(2, 2, 64, 16), torch.zeros(2, 2, 64, 16)),
        call(query=Q[0, 0], sinks=torch.zeros(3)),
    ],
)
def test_other_shapes_get_no_advice_to_transpose(function) -> None:
    with pytest.raises(ValueError, match="expected") as raised:
        function()
    assert "transpose" not in str(raised.value)


def test_a_padding_mask_of_ones_and_zeros_is_told_once() -> None:
    """A tokenizer's attention_mask, converted to float, is added to the scores and hides no key.

    One warning says so.
    """
    masks._warn_of_zeros_and_ones.cache_clear()
    attention_mask = torch.ones(2, 7)
    attention_mask[1, 4:] = 0
    module = fused_attn.FusedMultiheadAttention(8, 2, batch_first=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for bias in (torch.full((2, 7), 0.5), -attention_mask, attention_mask.log(), torch.zeros(2, 7)):
            call(key_padding_mask=bias)()
        assert not caught
        module(KV[:, 0], KV[:, 0], KV[:, 0], key_padding_mask=attention_mask)
        call(key_padding_mask=attention_mask)()
        call(key_padding_mask=attention_mask.bfloat16())()
    (warning,) = caught
    assert "key_padding_mask: the floating-point values 0 and 1" in str(warning.message)
    assert "attention_mask == 0" in str(warning.message)


def test_padding_of_the_lowest_number_is_told_once() -> None:
    """Keys with such a bias are computed, and keys with -inf are not. One warning says so."""
    masks._warn_of_lowest_number.cache_clear()
    is_padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for lowest in (float("-inf"), -1e4):
            call(key_padding_mask=torch.zeros(2, 7).masked_fill(is_padding, lowest))()
        assert not caught
        for dtype in (torch.float32, torch.bfloat16):
            call(key_padding_mask=torch.zeros(2, 7, dtype=dtype).masked_fill(is_padding, torch.finfo(dtype).min))()
    (warning,) = caught
    assert "key_padding_mask: the lowest finite number" in str(warning.message)


def test_a_padding_mask_of_integers_gets_advice() -> None:
    """The bool of a tokenizer's attention_mask would be the opposite of a padding mask."""
    attention_mask = torch.ones(2, 7, dtype=torch.int64)
    module = fused_attn.FusedMultiheadAttention(8, 2, batch_first=True)
    with pytest.raises(TypeError, match=r"got torch.int64; a tokenizer's .* becomes one by `attention_mask == 0`"):
        call(key_padding_mask=attention_mask)()
    with pytest.raises(AssertionError, match=r"got torch.int64; a tokenizer's .* becomes one by `attention_mask == 0`"):
        module(KV[:, 0], KV[:, 0], KV[:, 0], key_padding_mask=attention_mask)


def test_a_padding_mask_without_contents_is_not_read() -> None:
    query, mask = Q.to(META), torch.zeros(2, 5, device=META)
    assert fused_attn.fused_attention(query, query, query, key_padding_mask=mask).shape == Q.shape


def test_lower_right_bias_and_is_causal_contradict() -> None:
    mask = causal_lower_right(5, 7)
    message = (
        "is_causal: expected False with a lower-right causal bias as attn_mask, "
        "or diagonal_alignment='lower_right', got True"
    )
    with pytest.raises(ValueError, match=message):
        fused_attn.fused_attention(Q, KV, KV, mask, is_causal=True)
    with_bias = fused_attn.fused_attention(Q, KV, KV, mask)
    assert torch.equal(
        fused_attn.fused_attention(Q, KV, KV, mask, is_causal=True, diagonal_alignment="lower_right"), with_bias
    )


def varlen(**changes):
    x = torch.zeros(9, 2, 8)
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    arguments = {
        "query": x,
        "key": x,
        "value": x,
        "cu_seqlens_q": offsets,
        "cu_seqlens_k": offsets,
        "max_seqlen_q": 5,
        "max_seqlen_k": 5,
    }
    return lambda: fused_attn.fused_attention_varlen(**(arguments | changes))


def int32(*offsets: int) -> torch.Tensor:
    return torch.tensor(offsets, dtype=torch.int32)


def paged(**changes):
    pages = torch.zeros(9, 4, 2, 8)
    arguments = {
        "query": Q,
        "key_pages": pages,
        "value_pages": pages,
        "block_table": torch.zeros(2, 3, dtype=torch.int32),
        "key_lengths": int32(3, 12),
    }
    return lambda: fused_attn.fused_attention_paged(**(arguments | changes))


def packed_pages(**changes):
    packed = {"query": Q[0].transpose(0, 1), "cu_seqlens_q": int32(0, 2, 5), "max_seqlen_q": 3}
    return paged(**(packed | changes))


PAGED = {
    "packed-rank": (
        packed_pages(query=Q),
        ValueError,
        r"query: expected shape \(total_q, H, D\), as there is cu_seqlens_q, got shape \(2, 4, 5, 8\)",
    ),
    "packed-longest": (
        packed_pages(max_seqlen_q=None),
        ValueError,
        r"max_seqlen_q: expected the longest sequence of queries, as there is cu_seqlens_q, got None",
    ),
    "longest-alone": (paged(max_seqlen_q=5), ValueError, r"max_seqlen_q: expected None without cu_seqlens_q, got 5"),
    "packed-longer": (packed_pages(max_seqlen_q=2), ValueError, r"max_seqlen_q: expected at least .*, 3, got 2"),
    "packed-offsets": (packed_pages(cu_seqlens_q=int32(0, 3, 6)), ValueError, r"cu_seqlens_q: expected .* 5.*"),
    "packed-sequences": (
        packed_pages(cu_seqlens_q=int32(0, 5)),
        ValueError,
        r"block_table: expected shape \(B, pages of the longest sequence\) with B = 1",
    ),
    "packed-padding": (
        packed_pages(key_padding_mask=torch.zeros(2, 12, dtype=torch.bool)),
        ValueError,
        r"key_padding_mask: expected None with cu_seqlens_q, got a tensor",
    ),
    "packed-type": (packed_pages(cu_seqlens_q=[0, 2, 5]), TypeError, r"cu_seqlens_q: expected a torch\.Tensor"),
    "packed-longest-type": (packed_pages(max_seqlen_q=3.0), TypeError, r"max_seqlen_q: expected an int"),
    "no-tensor": (paged(key_pages=None), TypeError, r"key_pages: expected a torch\.Tensor, got NoneType"),
    "table-none": (paged(block_table=None), TypeError, r"block_table: expected a torch\.Tensor, got NoneType"),
    "rank": (
        paged(query=Q[0]),
        ValueError,
        r"query: expected shape \(B, H, L, D\), or three .* with cu_seqlens_q, got",
    ),
    "dtype": (paged(key_pages=torch.zeros(9, 4, 2, 8).half()), TypeError, r"key_pages: expected the dtype of query"),
    "head-dim": (paged(key_pages=torch.zeros(9, 4, 2, 9)), ValueError, r"key_pages: expected the head dim of query, 8"),
    "heads": (
        paged(key_pages=torch.zeros(9, 4, 3, 8), value_pages=torch.zeros(9, 4, 3, 8)),
        ValueError,
        r"key_pages: expected a number of heads that divides the 4 of query, got 3 heads",
    ),
    "value": (
        paged(value_pages=torch.zeros(9, 5, 2, 8)),
        ValueError,
        r"value_pages: expected the pages, rows and heads of key_pages, \(9, 4, 2\), got shape \(9, 5, 2, 8\)",
    ),
    "page-size": (
        paged(key_pages=torch.zeros(9, 0, 2, 8), value_pages=torch.zeros(9, 0, 2, 8)),
        ValueError,
        r"key_pages: expected pages of at least one row",
    ),
    "no-page": (
        paged(key_pages=torch.zeros(0, 4, 2, 8), value_pages=torch.zeros(0, 4, 2, 8)),
        ValueError,
        r"key_pages: expected at least one page",
    ),
    "table-dtype": (
        paged(block_table=torch.zeros(2, 3, dtype=torch.int64)),
        TypeError,
        r"block_table: expected dtype torch\.int32, got torch\.int64",
    ),
    "table-shape": (
        paged(block_table=torch.zeros(3, 3, dtype=torch.int32)),
        ValueError,
        r"block_table: expected shape \(B, pages of the longest sequence\) with B = 2, the number of sequences, got",
    ),
    "lengths-shape": (paged(key_lengths=int32(3)), ValueError, r"key_lengths: expected shape \(B,\) = \(2,\), got"),
    "lengths-device": (
        paged(key_lengths=int32(3, 3).to(META)),
        ValueError,
        r"key_lengths: expected the device of query",
    ),
    "padding-dtype": (
        paged(key_padding_mask=torch.zeros(2, 12)),
        TypeError,
        r"key_padding_mask: expected bool for paged",
    ),
    "padding-shape": (
        paged(key_padding_mask=torch.zeros(2, 11, dtype=torch.bool)),
        ValueError,
        r"key_padding_mask: expected shape \(B, S\) = \(2, 12\)",
    ),
    "sinks": (paged(sinks=torch.zeros(3)), ValueError, r"sinks: expected shape \(H,\) = \(4,\)"),
    "is-causal": (paged(is_causal=1), TypeError, r"is_causal: expected a bool, got int 1"),
    "splits-type": (paged(num_splits=2.0), TypeError, r"num_splits: expected None or an int, got float 2\.0"),
    "splits": (paged(num_splits=257), ValueError, r"num_splits: expected a number from 1 to 256, got 257"),
    "backend": (paged(backend="gpu"), ValueError, r"backend: expected None or one of"),
    "call-lengths-dtype": (
        call(key_lengths=torch.tensor([3, 3])),
        TypeError,
        r"key_lengths: expected dtype torch\.int32, got torch\.int64",
    ),
    "call-lengths-shape": (
        call(key_lengths=int32(3, 3, 3)),
        ValueError,
        r"key_lengths: expected shape \(B,\) = \(2,\)",
    ),
    "call-lengths-list": (call(key_lengths=[3, 3]), TypeError, r"key_lengths: expected a torch\.Tensor, got list"),
    "ranges-dtype": (
        call(key_ranges=torch.zeros(5, 1, 2)),
        TypeError,
        r"key_ranges: expected dtype torch\.int32, got torch\.float32",
    ),
    "ranges-device": (
        call(key_ranges=torch.zeros(1, 1, 2, dtype=torch.int32, device=META)),
        ValueError,
        r"key_ranges: expected the device of query",
    ),
    **{
        f"ranges-shape-{number}": (
            call(key_ranges=torch.zeros(shape, dtype=torch.int32)),
            ValueError,
            r"key_ranges: expected a shape \(\.\.\., L, N, 2\) with N > 0 whose dimensions before N broadcast to "
            r"\(\.\.\., H, L\) = \(2, \d, \d+\), got shape \(",
        )
        for number, shape in enumerate(
            [(3,), (1, 2), (1, 1, 3), (1, 0, 2), (9, 1, 2), (1, 2, 1, 1, 1, 2), (3, 1, 1, 1, 2)]
        )
    },
    "ranges-list": (call(key_ranges=[[0, 1]]), TypeError, r"key_ranges: expected a torch\.Tensor, got list"),
    "call-splits": (call(num_splits=0), ValueError, r"num_splits: expected a number from 1 to 256, got 0"),
    "call-splits-bool": (call(num_splits=True), TypeError, r"num_splits: expected None or an int, got bool True"),
}


@pytest.mark.parametrize("name", PAGED)
def test_paged(name: str) -> None:
    function, error, message = PAGED[name]
    with pytest.raises(error, match=f"^{message}"):
        function()


VARLEN = {
    "rank": (
        varlen(query=torch.zeros(1, 9, 2, 8)),
        ValueError,
        r"query: expected shape \(total, heads, head dim\), got shape \(1, 9, 2, 8\)",
    ),
    "one-query-head": (
        varlen(query=torch.zeros(9, 1, 8)),
        ValueError,
        r"key: expected as many heads as query, 1, got 2 heads",
    ),
    "offsets-dtype": (
        varlen(cu_seqlens_q=torch.tensor([0, 4, 9])),
        TypeError,
        r"cu_seqlens_q: expected dtype torch\.int32, got torch\.int64",
    ),
    "offsets-rank": (
        varlen(cu_seqlens_k=int32(0, 9)[None]),
        ValueError,
        r"cu_seqlens_k: expected shape \(num_sequences \+ 1,\)",
    ),
    "offsets-empty": (
        varlen(cu_seqlens_q=int32()),
        ValueError,
        r"cu_seqlens_q: expected shape \(num_sequences \+ 1,\), got shape \(0,\)",
    ),
    "offsets-count": (
        varlen(cu_seqlens_k=int32(0, 9)),
        ValueError,
        r"cu_seqlens_k: expected the shape of cu_seqlens_q, \(3,\), got \(2,\)",
    ),
    "offsets-first": (
        varlen(cu_seqlens_q=int32(1, 4, 9)),
        ValueError,
        r"cu_seqlens_q: expected offsets that rise from 0 .*, 9, got \[1, 4, 9\]",
    ),
    "offsets-last": (
        varlen(cu_seqlens_k=int32(0, 4, 10)),
        ValueError,
        r"cu_seqlens_k: expected offsets that rise from 0",
    ),
    "offsets-fall": (
        varlen(cu_seqlens_k=int32(0, 10, 9)),
        ValueError,
        r"cu_seqlens_k: expected offsets that rise from 0",
    ),
    "max-too-small": (
        varlen(max_seqlen_q=4),
        ValueError,
        r"max_seqlen_q: expected at least the longest sequence, 5, got 4",
    ),
    "max-k-too-small": (
        varlen(max_seqlen_k=3),
        ValueError,
        r"max_seqlen_k: expected at least the longest sequence, 5, got 3",
    ),
    "max-type": (varlen(max_seqlen_q=torch.tensor(5)), TypeError, r"max_seqlen_q: expected an int, got torch.Tensor"),
    "max-negative": (varlen(max_seqlen_k=-1), ValueError, r"max_seqlen_k: expected a number of rows in .*, got -1"),
    "max-huge": (varlen(max_seqlen_q=2**70), ValueError, r"max_seqlen_q: expected a number of rows in .*, got 1180"),
    "value-rows": (
        varlen(value=torch.zeros(8, 2, 8)),
        ValueError,
        r"value: expected the rows and heads of key, \(9, 2\), got shape \(8, 2, 8\)",
    ),
    "heads": (varlen(query=torch.zeros(9, 4, 8)), ValueError, r"key: expected 4 heads; enable_gqa=True .* got 2 heads"),
    "relative-shape": (
        varlen(relative_bias=torch.zeros(2, 11)),
        ValueError,
        r"relative_bias: expected shape \(H, max_seqlen_q \+ max_seqlen_k - 1\) = \(2, 9\)",
    ),
}


@pytest.mark.parametrize("name", VARLEN)
def test_fused_attention_varlen(name: str) -> None:
    function, exception, message = VARLEN[name]
    with pytest.raises(exception, match=message):
        function()


def test_sinks_of_packed_sequences_are_checked() -> None:
    with pytest.raises(ValueError, match=r"sinks: expected shape \(H,\) = \(2,\), got shape \(5,\)"):
        varlen(sinks=torch.zeros(5))()


def test_named_backend_never_falls_back() -> None:
    """Only the reference computes this head dim. A call that names no backend runs; one that names "cpu" raises."""
    wide = torch.zeros(1, 1, 3, 600)
    assert fused_attn.fused_attention(wide, wide, wide).shape == (1, 1, 3, 600)
    assert fused_attn.explain(wide, wide, wide).chosen == "reference"
    with pytest.raises(ValueError, match=r"(?s)backend='cpu' cannot run .*D=600.*- head dim 600 is above 512"):
        fused_attn.fused_attention(wide, wide, wide, backend="cpu")


def test_the_native_kernels_number_keys_with_32_bits() -> None:
    """All keys are the same row of memory."""
    query, key = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 8).expand(1, 1, 2**31, 8)
    assert fused_attn.explain(query, key, key).chosen != "cpu"
    with pytest.raises(ValueError, match=r"(?s)backend='cpu' cannot run .*- 2147483648 keys are more than 2147483647"):
        fused_attn.fused_attention(query, key, key, backend="cpu")


def test_named_backend_never_falls_back_when_compiled() -> None:
    wide = torch.zeros(1, 1, 3, 600)
    compiled = torch.compile(fused_attn.fused_attention, backend="eager")
    with pytest.raises(Exception, match=r"head dim 600 is above 512"):
        compiled(wide, wide, wide, backend="cpu")


def test_explain_names_every_backend_and_its_reasons() -> None:
    wide = torch.zeros(1, 1, 3, 600)
    explanation = fused_attn.explain(wide, wide, wide, is_causal=True)
    assert set(explanation.reasons) == set(dispatch.BACKEND_NAMES)
    assert "head dim 600 is above 512" in str(explanation)
    with pytest.raises(ValueError, match="dropout_p"):
        fused_attn.explain(wide, wide, wide, dropout_p=2.0)


def shared(**options):
    return lambda: context_parallel_attention(Q, KV, KV, mesh=None, **options)


def shared_packed(**options):
    offsets = int32(0, 9)
    return lambda: context_parallel_attention_varlen(Q, KV, KV, offsets, offsets, 9, 9, mesh=None, **options)


def partial(**options):
    return lambda: attention_partial(Q, KV, KV, **options)


#: These errors come before the mesh is read, so they need no process group.
SHARED = {
    "lse": (shared(return_lse="no"), TypeError, "return_lse: expected a bool, got str 'no'"),
    "seed": (shared(dropout_seed="abc"), TypeError, "dropout_seed: expected .*, got str 'abc'"),
    "method": (shared(method=3), ValueError, "method: expected one of .*, got 3"),
    "lengths": (shared(seqlens=5), ValueError, r"seqlens: expected \(L, S\), the lengths of .*, got 5"),
    "lengths-float": (shared(seqlens=(5.0, 7)), TypeError, r"seqlens: expected an int, got float 5\.0"),
    "lengths-negative": (shared(seqlens=(5, -7)), ValueError, "seqlens: expected a number of rows in .*, got -7"),
    "mesh": (shared(seqlens=(5, 7)), TypeError, "mesh: expected a DeviceMesh or a ProcessGroup, got NoneType"),
    "packed-lse": (shared_packed(return_lse=1), TypeError, "return_lse: expected a bool, got int 1"),
    "compare": (shared_packed(compare_ranks="no"), TypeError, "compare_ranks: expected a bool, got str 'no'"),
    "shard": (lambda: shard_sequence([1], None, 0), TypeError, "x: expected a tensor, got list"),
    "shard-dim": (lambda: shard_sequence(Q, None, "a"), TypeError, "dim: expected an int, got str 'a'"),
    "shard-rank": (
        lambda: shard_sequence(Q, None, 4),
        ValueError,
        r"dim: expected a dimension of x, whose shape is \(2, 4, 5, 8\), got 4",
    ),
    "shard-mesh": (lambda: shard_sequence(Q, 3, 2), TypeError, "mesh: expected a DeviceMesh .*, got int"),
    "unshard": (lambda: unshard_sequence(None, None, 0), TypeError, "x: expected a tensor, got NoneType None"),
    "unshard-dim": (lambda: unshard_sequence(Q, None, True), TypeError, "dim: expected an int, got bool True"),
    "batch": (lambda: shard_batch([Q], None), TypeError, "batch: expected a mapping .*, got list"),
    "positions": (lambda: shard_positions(None, seqlen="a"), TypeError, "seqlen: expected an int, got str 'a'"),
    "positions-offsets": (
        lambda: shard_positions(None, cu_seqlens=[0, 9]),
        TypeError,
        "cu_seqlens: expected a tensor, got list",
    ),
    "plan-module": (lambda: tensor_parallel_plan(3), TypeError, r"module: expected a torch\.nn\.Module, got int 3"),
    "plan-flag": (
        lambda: tensor_parallel_plan(torch.nn.Linear(1, 1), sequence_parallel="no"),
        TypeError,
        "sequence_parallel: expected a bool, got str 'no'",
    ),
    "style-layout": (
        lambda: AttentionParallel(3),
        TypeError,
        "output_layout: expected None, Shard or Replicate, got int 3",
    ),
    "style-flag": (
        lambda: AttentionParallel(use_local_output="no"),
        TypeError,
        "use_local_output: expected a bool, got str 'no'",
    ),
    "titan": (
        lambda: VarlenAttention(3),
        TypeError,
        r"config: expected None or a VarlenAttention\.Config, got int 3",
    ),
    "part-seed": (partial(dropout_seed="abc"), TypeError, "dropout_seed: expected .*, got str 'abc'"),
    "part-mask": (partial(attn_mask=[1]), TypeError, "attn_mask: expected a tensor, got list"),
    "part-padding": (
        partial(key_padding_mask=[1], dropout_p=0.5, dropout_seed=1, key_offset=1),
        TypeError,
        "key_padding_mask: expected a tensor, got list",
    ),
    "part-bias": (partial(relative_bias=[1]), TypeError, r"relative_bias: expected a torch\.Tensor, got list"),
    "part-length": (partial(seqlen_q="a"), TypeError, "seqlen_q: expected an int, got str 'a'"),
    "part-offset": (
        partial(query_offset=True),
        ValueError,
        "query_offset: expected an int from 0 to 1073741823, got True",
    ),
    "part-packed": (partial(packed=3), TypeError, "packed: expected PackedRows, got int 3"),
}


@pytest.mark.parametrize("name", SHARED)
def test_parts_and_shared_sequences(name: str) -> None:
    function, exception, message = SHARED[name]
    with pytest.raises(exception, match=f"^{message}"):
        function()
