"""Random combinations of sizes, layouts, masks and features, compared with the oracle."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import Case
from conftest import runnable_backends
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

BACKENDS = runnable_backends()

LENGTH = st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 33, 63, 64, 65, 97, 127, 128, 129, 150]))
HEAD_DIM = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 64, 72, 96, 128, 160, 256]))
LAYOUT = st.sampled_from(["contiguous", "blhd", "lbhd", "bhdl", "sliced", "every_second_column"])
KV_LAYOUT = st.one_of(LAYOUT, st.sampled_from(["one_batch_expanded", "one_head_expanded", "one_row_expanded"]))
DOUT_LAYOUT = st.one_of(KV_LAYOUT, st.just("one_number_expanded"))
MASK_SHAPE = st.tuples(*(st.sampled_from([letter, "1"]) for letter in "BHLS")).map("".join)
ALIGNMENT = st.sampled_from(["upper_left", "lower_right"])


@st.composite
def attention_cases(draw: st.DrawFn) -> Case:
    heads, kv_heads = draw(st.sampled_from([(1, None), (2, None), (3, None), (4, 2), (3, 1), (2, 2)]))
    batch, seqlen_q, seqlen_k = draw(st.integers(1, 3)), draw(LENGTH), draw(LENGTH)
    head_dim = draw(HEAD_DIM)
    options = {"is_causal": draw(st.booleans()), "softcap": draw(st.sampled_from([0.0, 0.0, 1.5, 30.0]))}
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.0, 0.05, 1.0, -0.2]))
    if draw(st.booleans()):
        side = st.one_of(st.integers(-1, 12), st.integers(40, 140))
        options["window_size"] = (draw(side), draw(side))
    if draw(st.integers(0, 3)) == 0:
        options["return_max"] = True
    if draw(st.integers(0, 3)) == 0:
        options["num_splits"] = draw(st.sampled_from([1, 2, 7, 256]))
    if draw(st.integers(0, 3)) == 0:
        options |= {
            "dropout_p": draw(st.sampled_from([0.1, 0.5, 0.9, 1.0])),
            "dropout_seed": draw(st.integers(0, 2**63 - 1)),
        }
    mask_shape = draw(MASK_SHAPE)
    attn_mask = draw(
        st.sampled_from(
            [
                None,
                cases.bool_mask(mask_shape, 0.8),
                cases.bool_mask(mask_shape, 0.1),
                cases.float_mask(mask_shape),
                cases.float_mask(mask_shape, offset=-150.0),
                cases.empty_rows_mask,
                cases.minus_inf_rows_mask,
                cases.float_mask_with(lambda dtype: float("-inf"), mask_shape),
                cases.t5_strided_mask,
                cases.float_mask(mask_shape, torch.float32),
                cases.upper_left,
                "lower_right",
            ]
        )
    )
    if attn_mask == "lower_right":
        attn_mask, options["is_causal"] = cases.lower_right, False
    if attn_mask is not cases.upper_left:  # with another alignment, this bias is an error
        options["diagonal_alignment"] = draw(ALIGNMENT)
    padding = draw(st.sampled_from([None, None, cases.scattered_padding, cases.float_padding, "trailing"]))
    if padding == "trailing":
        padding = cases.padding(*(draw(st.integers(0, seqlen_k)) for _ in range(batch)))
    key_ranges = None
    if draw(st.integers(0, 3)) == 0:
        shape = draw(st.sampled_from(["B1L", "BHL", "HL", "L", "B11", "1"]))
        key_ranges = cases.random_ranges(shape, draw(st.integers(1, 3)))
    key_lengths = None
    if draw(st.integers(0, 2)) == 0:
        key_lengths = tuple(draw(st.integers(0, seqlen_k)) for _ in range(batch))
    edits = [None, None, cases._scale_query(30.0)] + ([cases._nan_in_padding] if padding is not None else [])
    edits += [cases._nan_behind_lengths] * 2 if key_lengths is not None else []
    sink = draw(st.sampled_from([None, None, cases.sink(), cases.sink(20.0), cases.sink(0.0, torch.float32)]))
    relative_bias = draw(st.sampled_from([None, None, cases.per_head_bias, cases.shared_bias, cases.float32_bias]))
    # Backends have other kernels if only some gradients are wanted. Alone, the gradient of value has no share in lse.
    wanted = draw(st.sampled_from([None, None, None, ("query",), ("key",), ("query", "value"), ("key", "value")]))
    return Case(
        id=f"fuzz-{draw(st.integers(0, 999))}",
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=head_dim,
        value_dim=draw(st.one_of(st.none(), HEAD_DIM)),
        query_layout=draw(LAYOUT) if seqlen_q else "contiguous",
        kv_layout=draw(KV_LAYOUT) if seqlen_k else "contiguous",
        dout_layout=draw(DOUT_LAYOUT) if seqlen_q else "contiguous",
        attn_mask=attn_mask,
        key_padding_mask=padding,
        key_ranges=key_ranges,
        relative_bias=relative_bias,
        sinks=sink,
        options=options,
        key_lengths=key_lengths,
        edit=draw(st.sampled_from(edits)),
        differentiated=wanted,
        has_dlse=draw(st.booleans()),
    )


@st.composite
def packed_cases(draw: st.DrawFn) -> Case:
    heads, kv_heads = draw(st.sampled_from([(1, None), (2, None), (4, 2), (3, 1)]))
    lengths = st.lists(st.one_of(st.integers(0, 9), st.sampled_from([33, 64, 65])), min_size=1, max_size=4)
    lengths_q = draw(lengths)
    lengths_k = draw(st.lists(st.integers(0, 70), min_size=len(lengths_q), max_size=len(lengths_q)))
    options = {"is_causal": draw(st.booleans()), "softcap": draw(st.sampled_from([0.0, 2.0]))}
    options["diagonal_alignment"] = draw(ALIGNMENT)
    if draw(st.booleans()):
        options["window_size"] = (draw(st.integers(-1, 20)), draw(st.integers(-1, 20)))
    if draw(st.booleans()):
        options |= {"dropout_p": 0.3, "dropout_seed": draw(st.integers(0, 2**63 - 1))}
    if draw(st.integers(0, 3)) == 0:
        options["return_max"] = True
    has_columns = max(lengths_q) and max(lengths_k)
    return Case(
        id=f"fuzz-packed-{draw(st.integers(0, 999))}",
        heads=heads,
        kv_heads=kv_heads,
        head_dim=draw(HEAD_DIM),
        value_dim=draw(st.one_of(st.none(), HEAD_DIM)),
        lengths_q=tuple(lengths_q),
        lengths_k=tuple(lengths_k),
        relative_bias=draw(st.sampled_from([None, cases.per_head_bias, cases.shared_bias])) if has_columns else None,
        sinks=draw(st.sampled_from([None, cases.sink()])),
        options=options,
        has_dlse=draw(st.booleans()),
    )


@st.composite
def paged_cases(draw: st.DrawFn) -> Case:
    heads, kv_heads = draw(st.sampled_from([(1, None), (2, None), (4, 2), (3, 1)]))
    batch, page_size = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 7, 16, 17, 24, 64, 65, 130, 192]))
    seqlen_k = draw(st.one_of(st.integers(0, 20), st.integers(0, 300)))
    options = {"is_causal": draw(st.booleans()), "softcap": draw(st.sampled_from([0.0, 2.0]))}
    if draw(st.booleans()):
        options["window_size"] = (draw(st.integers(-1, 70)), draw(st.integers(-1, 20)))
    if draw(st.integers(0, 3)) == 0:
        options["num_splits"] = draw(st.sampled_from([1, 2, 7, 256]))
    columns = -(-seqlen_k // page_size) * page_size
    is_packed = draw(st.booleans())
    lengths_q = tuple(draw(st.one_of(st.integers(0, 9), st.sampled_from([1, 33, 65]))) for _ in range(batch))

    def padding(case: Case, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
        return torch.rand((batch, columns), generator=generator) < 0.4

    return Case(
        id=f"fuzz-paged-{draw(st.integers(0, 999))}",
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        seqlen_q=draw(st.one_of(st.integers(0, 9), st.sampled_from([33, 64, 65]))),
        seqlen_k=seqlen_k,
        head_dim=draw(HEAD_DIM),
        value_dim=draw(st.one_of(st.none(), HEAD_DIM)),
        kv_layout=draw(st.sampled_from(["contiguous", "blhd", "sliced"])),
        lengths_q=lengths_q if is_packed else None,
        page_size=page_size,
        shares_pages=draw(st.booleans()),
        key_lengths=tuple(draw(st.integers(0, seqlen_k)) for _ in range(batch)),
        key_padding_mask=None if is_packed else draw(st.sampled_from([None, padding])),
        sinks=draw(st.sampled_from([None, cases.sink()])),
        options=options,
    )


# Hypothesis warns of fixtures that all examples share. `poisoned` does not depend on the example, so it may be shared.
fuzz = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
DTYPE = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@fuzz
@given(case=attention_cases(), dtype=DTYPE)
def test_fused_attention(case: Case, dtype: torch.dtype, poisoned: None) -> None:
    for backend in BACKENDS:
        cases.check(case, dtype, backend)


@fuzz
@given(case=packed_cases(), dtype=DTYPE)
def test_fused_attention_varlen(case: Case, dtype: torch.dtype, poisoned: None) -> None:
    for backend in BACKENDS:
        cases.check(case, dtype, backend)


@fuzz
@given(case=paged_cases(), dtype=DTYPE)
def test_fused_attention_paged(case: Case, dtype: torch.dtype, poisoned: None) -> None:
    for backend in BACKENDS:
        cases.check(case, dtype, backend)


@pytest.mark.quick
@settings(fuzz, max_examples=8)
@given(case=attention_cases(), dtype=DTYPE)
def test_fused_attention_quick(case: Case, dtype: torch.dtype, poisoned: None) -> None:
    for backend in BACKENDS:
        cases.check(case, dtype, backend)
