"""Named tuples that group the arguments of the kernels. A kernel reads their fields by name.

- A field that is None compiles its feature out, so that a kernel needs no flag for the feature.
- Triton compiles a kernel anew if an integer in a tuple becomes divisible by 16 or equal to 1. That pays for strides.
  Lengths change from batch to batch, so they are plain arguments, for which `UNSPECIALIZED` prevents this.
"""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from fused_attn.attention import dropout
from fused_attn.attention.inputs import Inputs
from fused_attn.attention.problem import NO_ORIGIN, UNBOUNDED, AttentionProblem, DropoutOrigin
from fused_attn.backends.triton.configs import Config, padded_head_dim

#: Arguments of kernels whose value never causes another compilation.
UNSPECIALIZED = ("seqlen_q", "seqlen_k", "lse_stride", "band_offset", "heads_per_l2_group")

#: The values of `Rows.ALIGN`.
ALIGNS = {align: tl.constexpr(align) for align in (1, 2, 4, 8)}


class Rows(NamedTuple):
    """The rows of a tensor (B, heads, rows, columns), of packed rows, or of pages. The column stride is 1.

    A packed tensor is (total rows, heads, columns). Its stride_b is 0, because q_offset and k_offset lead to the rows
    of a sequence. Pages are (num_pages, page_size, heads, columns). Their stride_b is that of a page.

    ALIGN: all strides are multiples of this many elements. Triton itself sees strides that are multiples of 16, so
        ALIGN is 1 for these. From others it would conclude nothing: a thread would load one element at a time, and
        loads of 16 bits cannot be pipelined. With head dim 72, for example, rows begin at multiples of 8 elements.
    """

    ptr: Tensor | None
    stride_b: int = 0
    stride_h: int = 0
    stride_row: int = 0
    ALIGN: tl.constexpr = ALIGNS[1]

    @classmethod
    def of(cls, x: Tensor | None, is_packed: bool = False) -> Rows:
        if x is None:
            return NO_ROWS
        if is_packed:
            stride_row, stride_h, _ = x.stride()
            return _new(cls, (x, 0, stride_h, stride_row, _align(stride_h | stride_row)))
        stride_b, stride_h, stride_row, _ = x.stride()
        return _new(cls, (x, stride_b, stride_h, stride_row, _align(stride_b | stride_h | stride_row)))

    @classmethod
    def of_pages(cls, x: Tensor) -> Rows:
        stride_page, stride_row, stride_h, _ = x.stride()
        return _new(cls, (x, stride_page, stride_h, stride_row, _align(stride_page | stride_h | stride_row)))


def _align(strides: int) -> tl.constexpr:
    """`Rows.ALIGN`; strides: the bits of all strides together, whose lowest bit is the largest power of two."""
    rest = strides % 16
    return ALIGNS[rest & -rest or 1]


NO_ROWS = Rows(None)


class Scores(NamedTuple):
    """A mask or bias that broadcasts to (B, H, L, S), or ranges. The stride of a dimension of size 1 is 0.

    ALIGN: as in `Rows`, but 8 or 1, and not for stride_col. Lengths that change from batch to batch would otherwise
        cause more compilations.
    """

    ptr: Tensor | None
    stride_b: int = 0
    stride_h: int = 0
    stride_row: int = 0
    stride_col: int = 0
    ALIGN: tl.constexpr = ALIGNS[1]

    @classmethod
    def of(cls, x: Tensor | None) -> Scores:
        if x is None:
            return NO_SCORES
        batch, heads, rows, columns = x.shape
        stride_b, stride_h, stride_row, stride_col = x.stride()
        stride_b = 0 if batch == 1 else stride_b
        stride_h = 0 if heads == 1 else stride_h
        stride_row = 0 if rows == 1 else stride_row
        stride_col = 0 if columns == 1 else stride_col
        align = ALIGNS[8 if (stride_b | stride_h | stride_row) % 16 == 8 else 1]
        return _new(cls, (x, stride_b, stride_h, stride_row, stride_col, align))


NO_SCORES = Scores(None)


class Masks(NamedTuple):
    """The tensors of a call besides query, key and value. A feature that the call does not use is None.

    mask: bool, broadcasts to (B, H, L, S). True = visible
    ranges: int32, broadcasts to (B, H, L, 2 N). Begin and end of the N ranges of keys of each query
    bias: broadcasts to (B, H, L, S)
    key_bias: (B, S), contiguous
    key_padding: (B, S) bytes, nonzero = padding
    relative_bias: (H|1, L + S - 1)
    relative_bias_stride_h: elements from one head to the next; 0 if all heads share one row
    sinks: (H,)
    seed: 0-d int64, of dropout
    key_lengths: (B,) int32
    cu_seqlens_q, cu_seqlens_k: (num_sequences + 1,) int32
    block_table: (B, pages of an entry) int32, or None if keys and values are not paged
    block_table_stride: elements from one batch entry of the table to the next
    num_pages: how many pages there are
    """

    mask: Scores = NO_SCORES
    ranges: Scores = NO_SCORES
    bias: Scores = NO_SCORES
    key_bias: Tensor | None = None
    key_padding: Tensor | None = None
    relative_bias: Tensor | None = None
    relative_bias_stride_h: int = 0
    sinks: Tensor | None = None
    seed: Tensor | None = None
    key_lengths: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    block_table: Tensor | None = None
    block_table_stride: int = 0
    num_pages: int = 0

    @property
    def kind(self) -> tuple:
        """All properties of the masks that Triton compiles a kernel for; see `kind_of`."""
        return (
            kind_of(self.mask),
            kind_of(self.ranges),
            kind_of(self.bias),
            kind_of_pointer(self.key_bias),
            kind_of_pointer(self.key_padding),
            kind_of_pointer(self.relative_bias),
            self.relative_bias_stride_h,
            kind_of_pointer(self.sinks),
            kind_of_pointer(self.seed),
            kind_of_pointer(self.key_lengths),
            kind_of_pointer(self.cu_seqlens_q),
            kind_of_pointer(self.cu_seqlens_k),
            kind_of_pointer(self.block_table),
            self.block_table_stride,
            self.num_pages,
        )

    @classmethod
    def of(cls, inputs: Inputs) -> Masks:
        relative_bias = inputs.relative_bias
        if relative_bias is not None:
            relative_bias = relative_bias.resolve_neg().contiguous()
        block_table = inputs.block_table
        if block_table is not None:
            block_table = block_table.contiguous()
        return _new(
            cls,
            (
                Scores.of(inputs.mask),
                NO_SCORES if inputs.key_ranges is None else Scores.of(inputs.key_ranges.flatten(3)),
                NO_SCORES if inputs.bias is None else Scores.of(inputs.bias.resolve_neg()),
                None if inputs.key_bias is None else inputs.key_bias.resolve_neg().contiguous(),
                None if inputs.key_padding is None else inputs.key_padding.contiguous(),
                relative_bias,
                0 if relative_bias is None or relative_bias.shape[0] == 1 else relative_bias.shape[1],
                None if inputs.sinks is None else inputs.sinks.resolve_neg().contiguous(),
                inputs.seed,
                None if inputs.key_lengths is None else inputs.key_lengths.contiguous(),
                inputs.cu_seqlens_q,
                inputs.cu_seqlens_k,
                block_table,
                0 if block_table is None else block_table.shape[1],
                0 if block_table is None else inputs.key.shape[0],
            ),
        )


def kind_of_pointer(x: Tensor | None) -> tuple | None:
    """The properties of a pointer that Triton compiles a kernel for: the dtype, and whether 16 divides the address."""
    return None if x is None else (x.data_ptr() % 16, x.dtype)


def kind_of(x: Rows | Scores) -> tuple | None:
    """The properties of a tensor that Triton compiles a kernel for: those of its pointer, and its strides.

    Two calls whose tensors have equal kinds can use the same compiled kernel.
    """
    pointer = x[0]
    return None if pointer is None else (pointer.data_ptr() % 16, pointer.dtype, x[1:])


#: _new(cls, fields) is cls(*fields) in half of the time. The difference is measurable in a call with small tensors.
_new = tuple.__new__

NO_MASKS = Masks()
NO_MASKS_KIND = NO_MASKS.kind

#: The smallest and the largest scale for which `Settings.is_scale_folded` may be 1.
_FOLDED_SCALES = (2.0**-20, 2.0**20)


class Settings(NamedTuple):
    """The numbers that one problem fixes for one kernel. Those in capitals are compile-time constants.

    is_scale_folded: 1 if the scale is multiplied into the scores together with log2(e), in the argument of exp2,
        which saves a multiplication for each score. None if not. The conditions for 1:
        - No softcap and no bias stands between scale and exponential.
        - The scale is positive. Otherwise the maximum of a row would become its minimum, or 0 * -inf = NaN.
        - The scale lies within `_FOLDED_SCALES`, because the LSE is divided by the scale.
        - The products are not exact float32, where the rounding of large unscaled scores would be visible.
    softcap: None = off
    band_left, band_right: how many keys a query sees before and after its diagonal; None = unbounded
    is_band_from_end: 1 if the diagonal ends at the last key of each sequence (`Band.is_from_end`), else None
    dropout_threshold: an entry survives dropout if its random number (16 bits) is at least this one
    dropout_origin: None = zeros
    IS_FLOAT32: inputs are float32, and their products must not be rounded to TF32
    PAGE_SIZE: the rows of a page of keys; 0 = keys are not paged
    NUM_RANGES: the ranges of keys that a query has; 0 = the call has none
    """

    num_heads: int
    group_size: int
    scale: float
    is_scale_folded: int | None
    softcap: float | None
    band_left: int | None
    band_right: int | None
    is_band_from_end: int | None
    dropout_threshold: int
    dropout_scale: float
    dropout_origin: DropoutOrigin | None
    HEAD_DIM: tl.constexpr
    VALUE_DIM: tl.constexpr
    BLOCK_D: tl.constexpr
    BLOCK_DV: tl.constexpr
    BLOCK_M: tl.constexpr
    BLOCK_N: tl.constexpr
    PRECISION: tl.constexpr
    IS_FLOAT32: tl.constexpr
    PAGE_SIZE: tl.constexpr
    NUM_RANGES: tl.constexpr

    @classmethod
    def of(cls, problem: AttentionProblem, config: Config) -> Settings:
        """The settings of a kernel.

        problem: `has_bias` must say whether the call has a bias of any kind with an entry for each key, a key bias
            included. `has_key_bias` is not read, because it can be True for a call without a key bias.
        """
        band = problem.band
        # A bound beyond the largest distance hides no key, so it becomes None. This also keeps sums of positions
        # and bounds within 32 bits.
        reach = (problem.seqlen_q + problem.seqlen_k) * (2 if band.is_from_end else 1) + abs(band.offset)
        is_float32 = problem.dtype.itemsize == 4 and not problem.allows_tf32
        is_changed = is_float32 or problem.softcap or problem.has_bias or problem.has_relative_bias
        return cls(
            problem.num_heads,
            problem.group_size,
            problem.scale,
            1 if _FOLDED_SCALES[0] <= problem.scale <= _FOLDED_SCALES[1] and not is_changed else None,
            problem.softcap or None,
            None if band.left == UNBOUNDED or band.left >= reach else band.left,
            None if band.right == UNBOUNDED or band.right >= reach else band.right,
            1 if band.is_from_end else None,
            dropout.threshold(problem.dropout_p),
            dropout.scale(problem.dropout_p),
            None if problem.dropout_origin == NO_ORIGIN else problem.dropout_origin,
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
                    problem.page_size,
                    problem.num_ranges,
                ),
            ),
        )
