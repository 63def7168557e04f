"""What crosses from the host to a kernel: tuples that a kernel reads by field name, built from tensors.

A field that is None compiles the feature out, so a kernel needs no flag beside it. Triton specialises integers inside
a tuple (divisible by 16, equal to 1), which is wanted for strides; lengths, which change from batch to batch, are
plain kernel arguments that it is told not to specialise.
"""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from fused_attn.attention import dropout
from fused_attn.attention.inputs import Inputs
from fused_attn.attention.problem import UNBOUNDED, AttentionProblem
from fused_attn.backends.triton.configs import Config, padded_head_dim

#: Kernel arguments whose value must not cause another compilation.
UNSPECIALIZED = ("seqlen_q", "seqlen_k", "lse_stride", "band_offset", "heads_per_l2_group")


class Rows(NamedTuple):
    """A (B, heads, rows, columns) tensor with contiguous columns. Packed: (1, heads, total, columns), stride_b 0."""

    ptr: Tensor | None
    stride_b: int = 0
    stride_h: int = 0
    stride_row: int = 0

    @classmethod
    def of(cls, x: Tensor | None, is_packed: bool = False) -> Rows:
        if x is None:
            return NO_ROWS
        stride_b, stride_h, stride_row, _ = x.stride()
        return _new(cls, (x, 0 if is_packed else stride_b, stride_h, stride_row))


class Scores(NamedTuple):
    """A tensor that broadcasts to (B, H, L, S): the stride of a broadcast dimension is 0."""

    ptr: Tensor | None
    stride_b: int = 0
    stride_h: int = 0
    stride_row: int = 0
    stride_col: int = 0

    @classmethod
    def of(cls, x: Tensor | None) -> Scores:
        if x is None:
            return NO_SCORES
        batch, heads, rows, columns = x.shape
        stride_b, stride_h, stride_row, stride_col = x.stride()
        return _new(
            cls,
            (
                x,
                0 if batch == 1 else stride_b,
                0 if heads == 1 else stride_h,
                0 if rows == 1 else stride_row,
                0 if columns == 1 else stride_col,
            ),
        )


class Masks(NamedTuple):
    """Pointers to everything that hides, biases or drops scores; None where the problem has none.

    key_padding: (B, S) bytes, nonzero = padding
    relative_bias: (H|1, L + S - 1)
    sinks: (H,)
    seed: 0-d int64
    cu_seqlens_q, cu_seqlens_k: (num_sequences + 1,) int32
    """

    mask: Scores
    bias: Scores
    key_padding: Tensor | None
    relative_bias: Tensor | None
    relative_bias_stride_h: int
    sinks: Tensor | None
    seed: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None

    @property
    def kind(self) -> tuple:
        """See `kind_of`."""
        return (
            kind_of(self.mask),
            kind_of(self.bias),
            kind_of_pointer(self.key_padding),
            kind_of_pointer(self.relative_bias),
            self.relative_bias_stride_h,
            kind_of_pointer(self.sinks),
            kind_of_pointer(self.seed),
            kind_of_pointer(self.cu_seqlens_q),
            kind_of_pointer(self.cu_seqlens_k),
        )

    @classmethod
    def of(cls, inputs: Inputs) -> Masks:
        table = inputs.relative_bias
        if table is not None:
            table = table.resolve_neg().contiguous()
        return _new(
            cls,
            (
                Scores.of(inputs.mask),
                NO_SCORES if inputs.bias is None else Scores.of(inputs.bias.resolve_neg()),
                None if inputs.key_padding is None else inputs.key_padding.contiguous(),
                table,
                0 if table is None or table.shape[0] == 1 else table.shape[1],
                None if inputs.sinks is None else inputs.sinks.resolve_neg().contiguous(),
                inputs.seed,
                inputs.cu_seqlens_q,
                inputs.cu_seqlens_k,
            ),
        )


def kind_of_pointer(x: Tensor | None) -> tuple | None:
    """What Triton compiles a kernel for, of a pointer: its type, and whether the address is a multiple of 16."""
    return None if x is None else (x.data_ptr() % 16, x.dtype)


def kind_of(x: Rows | Scores) -> tuple | None:
    """What Triton compiles a kernel for, of a tensor: the kind of its pointer and all strides."""
    pointer = x[0]
    return None if pointer is None else (pointer.data_ptr() % 16, pointer.dtype, x[1:])


#: Makes a named tuple of a tuple. The class itself takes twice the time, which small calls feel.
_new = tuple.__new__

NO_ROWS = Rows(None)
NO_SCORES = Scores(None)
NO_MASKS = Masks(NO_SCORES, NO_SCORES, None, None, 0, None, None, None, None)
#: The kind of `NO_MASKS`.
NO_MASKS_KIND = NO_MASKS.kind


_FOLDED_SCALES = (2.0**-20, 2.0**20)


class Settings(NamedTuple):
    """All that is fixed for a problem and a kernel. Numbers that a model rarely changes, then compile-time constants.

    is_scale_folded: 1 if the scale can be multiplied in where the exponential is taken, else None. Nothing may come
        between; and the scale must be positive, or a row's maximum would become its minimum (or 0 * -inf, NaN), and
        of a usual size, because the LSE is divided by it. Not in float32, where large products would be rounded
    softcap: None = off
    band_left, band_right: how far a query sees before and after its diagonal; None = without end
    dropout_threshold: a random word, read as a signed number after its top bit is flipped, is kept from here on
    IS_FLOAT32: products are exact ones of float32, and what follows them is to be as accurate
    """

    num_heads: int
    group_size: int
    scale: float
    is_scale_folded: int | None
    softcap: float | None
    band_left: int | None
    band_right: int | None
    dropout_threshold: int
    dropout_scale: float
    HEAD_DIM: tl.constexpr
    VALUE_DIM: tl.constexpr
    BLOCK_D: tl.constexpr
    BLOCK_DV: tl.constexpr
    BLOCK_M: tl.constexpr
    BLOCK_N: tl.constexpr
    PRECISION: tl.constexpr
    IS_FLOAT32: tl.constexpr

    @classmethod
    def of(cls, problem: AttentionProblem, config: Config) -> Settings:
        band = problem.band
        # A window wider than all distances is none. This also keeps sums of positions within 32 bits.
        reach = problem.seqlen_q + problem.seqlen_k + abs(band.offset)
        is_float32 = problem.dtype.itemsize == 4 and not problem.allows_tf32
        is_changed = is_float32 or problem.softcap or problem.has_bias or problem.has_relative_bias
        return cls(
            problem.num_heads,
            problem.num_heads // max(problem.num_kv_heads, 1),
            problem.scale,
            1 if _FOLDED_SCALES[0] <= problem.scale <= _FOLDED_SCALES[1] and not is_changed else None,
            problem.softcap or None,
            None if band.left == UNBOUNDED or band.left >= reach else band.left,
            None if band.right == UNBOUNDED or band.right >= reach else band.right,
            dropout.threshold(problem.dropout_p) - 2**31,
            dropout.scale(problem.dropout_p),
            *map(
                tl.constexpr,
                (
                    problem.head_dim,
                    problem.value_dim,
                    padded_head_dim(problem.head_dim),
                    padded_head_dim(problem.value_dim),
                    config.block_m,
                    config.block_n,
                    "tf32" if problem.allows_tf32 else "ieee",
                    is_float32,
                ),
            ),
        )
