"""The meaning of masks.

`score_masks` turns the mask arguments of a call into fields of `Inputs`. `to_dense` turns these fields into dense
tensors, which the reference formula uses. The fields have the polarity of the arguments, so that no mask needs to be
copied: True means attend in a mask, and ignore in key padding.
"""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from fused_attn import modes
from fused_attn.attention.inputs import Inputs
from fused_attn.attention.layout import Layout
from fused_attn.attention.problem import UNBOUNDED, AttentionProblem, Band


def to_dense(problem: AttentionProblem, inputs: Inputs) -> tuple[Tensor | None, Tensor | None]:
    """All masks as visible (bool, True = attend) and all biases as bias (floating point, added to the logits).

    Both are broadcastable to (B, H, L, S). None means that everything is visible, or that there is no bias. The dtype
    of bias is the accumulate dtype.
    """
    rows, columns = positions(problem, inputs)
    distance = columns.position[None, :] - rows.position[:, None]  # (L, S)
    conditions = []
    band, offset = problem.band, _diagonal_offset(problem, inputs, rows)
    if band.left != UNBOUNDED:
        conditions.append(distance - offset >= -band.left)
    if band.right != UNBOUNDED:
        conditions.append(distance - offset <= band.right)
    if problem.is_packed:
        conditions.append((columns.sequence[None, :] == rows.sequence[:, None]) & rows.has_sequence[:, None])
    if (hidden := hidden_keys(problem, inputs)) is not None:
        conditions.append(~hidden[:, None, None, :])
    if inputs.mask is not None:
        conditions.append(inputs.mask)
    if inputs.key_ranges is not None:
        conditions.append(visible_in_ranges(inputs.key_ranges, problem.seqlen_k))
    visible = None
    for condition in conditions:
        visible = condition if visible is None else visible & condition

    # Biases are converted before they are added. So their gradients are summed in the accumulate dtype, too. Sums in
    # half precision would lose digits.
    compute = problem.accumulate_dtype
    bias = None if inputs.bias is None else inputs.bias.to(compute)
    if inputs.key_bias is not None:
        of_keys = inputs.key_bias.to(compute)[:, None, None, :]
        bias = of_keys if bias is None else bias + of_keys
    if inputs.relative_bias is not None:
        # A query and a key of different packed sequences can have a distance that has no column. Their score is hidden,
        # so any column can stand in.
        column = (distance + (problem.seqlen_q - 1)).clamp(0, inputs.relative_bias.shape[-1] - 1)
        # The backward of relative_bias[:, column] would write in place. torch's older transforms, such as
        # is_grads_batched, refuse to write in place.
        toeplitz = inputs.relative_bias.to(compute).index_select(1, column.flatten()).unflatten(1, column.shape)
        bias = toeplitz[None] if bias is None else bias + toeplitz[None]
    return visible, bias


def visible_in_ranges(key_ranges: Tensor, seqlen_k: int) -> Tensor:
    """The ranges of keys (..., N, 2) as a mask (..., seqlen_k), True = attend."""
    key = torch.arange(seqlen_k, device=key_ranges.device)
    visible = torch.zeros((), dtype=torch.bool, device=key_ranges.device)
    for begin, end in (x[..., None].unbind(-2) for x in key_ranges.unbind(-2)):
        visible = visible | ((key >= begin) & (key < end))
    return visible


def hidden_keys(problem: AttentionProblem, inputs: Inputs) -> Tensor | None:
    """(B, S) bool, True = the key is padding, or lies behind the length of its batch entry; None = no key is hidden.

    For packed queries, the rows of all entries stand in one row, (1, B * S), as `positions` counts the keys.
    """
    hidden = inputs.key_padding
    if inputs.key_lengths is not None:
        behind = torch.arange(problem.seqlen_k, device=inputs.key_lengths.device) >= inputs.key_lengths[:, None]
        hidden = behind if hidden is None else hidden | behind
    return hidden if hidden is None or not problem.is_packed else hidden.reshape(1, -1)


def _diagonal_offset(problem: AttentionProblem, inputs: Inputs, rows: Positions) -> int | Tensor:
    """The offset of the band's diagonal: a number. If the diagonal ends at the last key of a sequence, the offset is
    (B, 1, 1, 1), or (L, 1) for the packed queries at `rows`.
    """
    band = problem.band
    if not band.is_from_end:
        return band.offset
    lengths = None if inputs.key_lengths is None else inputs.key_lengths.clamp(0, problem.seqlen_k)
    if inputs.cu_seqlens_q is not None:
        keys = lengths if inputs.cu_seqlens_k is None else inputs.cu_seqlens_k.diff()
        assert keys is not None, "keys that are not packed have lengths"
        offsets = keys - inputs.cu_seqlens_q.diff() + band.offset
        # A row without a sequence, -1, gets the number that is appended. The row sees no key anyway.
        return torch.nn.functional.pad(offsets, (0, 1))[rows.sequence, None]
    if lengths is None:
        return band.offset + problem.seqlen_k - problem.seqlen_q
    return (lengths + (band.offset - problem.seqlen_q))[:, None, None, None]


def positions(problem: AttentionProblem, inputs: Inputs) -> tuple[Positions, Positions]:
    """The `Positions` of the queries (rows of the scores) and of the keys (columns).

    If packed queries have keys in pages, the columns are the S keys that the table has for each sequence, one sequence
    after the other.
    """
    device = inputs.query.device
    if inputs.cu_seqlens_q is None:
        return Positions.of_one(problem.seqlen_q, device), Positions.of_one(problem.seqlen_k, device)
    rows = Positions.of_packed(inputs.cu_seqlens_q, inputs.query.shape[2])
    if inputs.cu_seqlens_k is None:
        return rows, Positions.of_equal(problem.batch, problem.seqlen_k, device)
    return rows, Positions.of_packed(inputs.cu_seqlens_k, inputs.key.shape[2])


class Positions(NamedTuple):
    """Where each row of a tensor stands.

    position: (rows,) int64, the index of the row within its sequence
    sequence: (rows,) int64, the number of the sequence that the row belongs to; -1 = no sequence
    """

    position: Tensor
    sequence: Tensor

    @classmethod
    def of_one(cls, rows: int, device: torch.device) -> Positions:
        """The positions of `rows` rows that form a single sequence, number 0."""
        return cls(torch.arange(rows, device=device), torch.zeros(rows, dtype=torch.long, device=device))

    @classmethod
    def of_equal(cls, sequences: int, rows: int, device: torch.device) -> Positions:
        """The positions of sequences that have `rows` rows each, one sequence after the other."""
        row = torch.arange(sequences * rows, device=device)
        return cls(row % max(rows, 1), row // max(rows, 1))

    @classmethod
    def of_packed(cls, cu_seqlens: Tensor, total: int) -> Positions:
        """The positions of `total` packed rows, whose sequences begin at the offsets cu_seqlens."""
        offsets = cu_seqlens.long()
        row = torch.arange(total, device=offsets.device)
        # searchsorted - 1 is -1 for a row before the first sequence, and the number of sequences for a row behind the
        # last one. Neither row has a sequence.
        sequence = torch.searchsorted(offsets, row, right=True) - 1
        sequence = sequence.masked_fill(sequence == offsets.shape[0] - 1, -1)
        return cls((row - offsets[sequence]).masked_fill(sequence < 0, 0), sequence)

    @property
    def has_sequence(self) -> Tensor:
        """(rows,) bool: whether the row belongs to a sequence."""
        return self.sequence >= 0


def band_of(is_causal: bool, window_size: tuple[int, int], diagonal_offset: int = 0, is_from_end: bool = False) -> Band:
    """The `Band` of the scores that both the causal mask and the window leave visible.

    The causal mask is a band whose right side is 0. That is never farther than the right side of the window.
    """
    left, right = window_size
    if is_causal:
        right = 0
    if left == UNBOUNDED and right == UNBOUNDED:
        return Band()
    return Band(left, right, diagonal_offset, is_from_end)


def score_masks(
    problem: AttentionProblem, attn_mask: Tensor | None, key_padding_mask: Tensor | None, layout: Layout | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The fields (bias, key_bias, mask, key_padding) of `Inputs` for the mask arguments of a call.

    layout: how query, key and value were reshaped to four dimensions; None = they were not
    """
    mask = bias = key_bias = key_padding = None
    if attn_mask is not None:  # A causal bias of torch has become the problem's band: has_mask and has_bias are False.
        if problem.has_mask:
            mask = _to_rank_4(attn_mask, layout)
        elif problem.has_bias:
            bias = _to_rank_4(attn_mask, layout)
    if key_padding_mask is not None:
        if layout is not None:
            key_padding_mask = key_padding_mask.reshape(problem.batch, problem.seqlen_k)
        key_padding, key_bias = _normalise_padding(key_padding_mask)
    return bias, key_bias, mask, key_padding


def ranges_of_scores(key_ranges: Tensor, layout: Layout | None) -> Tensor:
    """The ranges of keys (..., L, N, 2) as (B|1, H|1, L|1, N, 2), with the last two dimensions contiguous."""
    ranges = _to_rank_4(key_ranges.resolve_neg().flatten(-2), layout)  # (B|1, H|1, L|1, 2 N)
    if ranges.stride(-1) != 1:
        ranges = ranges.contiguous()
    return ranges.unflatten(-1, (-1, 2))


def with_head_dim(relative_bias: Tensor | None) -> Tensor | None:
    """The relative bias with a dimension for heads: (L + S - 1,) -> (1, L + S - 1). Others are returned as they are."""
    return relative_bias[None] if relative_bias is not None and relative_bias.dim() == 1 else relative_bias


def _to_rank_4(mask: Tensor, layout: Layout | None) -> Tensor:
    """The mask (..., L, S) as (B|1, H|1, L|1, S|1). Batch dimensions are expanded only if one of them is not 1."""
    if layout is None:
        return mask if mask.dim() == 4 else _to_rank(4, mask)
    mask = _to_rank(len(layout.batch_shape) + 3, mask)
    if all(size == 1 for size in mask.shape[:-3]):
        return mask.reshape(1, *mask.shape[-3:])
    return mask.expand(*layout.batch_shape, *mask.shape[-3:]).reshape(layout.batch, *mask.shape[-3:])


def _to_rank(rank: int, x: Tensor) -> Tensor:
    """x with further dimensions of size 1 in front. ``x.reshape((1,) * n + x.shape)`` takes twice as long."""
    return x.view(*(1,) * (rank - x.dim()), *x.shape)


def _normalise_padding(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """(key_padding (B, S) bool, key_bias (B, S) or None) of a key_padding_mask (B, S).

    True and -inf in the mask mean padding. The finite numbers of a floating-point mask become the key bias.
    """
    if mask.dtype == torch.bool:
        return mask, None
    is_padding = mask == float("-inf")
    bias = mask.masked_fill(is_padding, 0.0)
    if modes.can_read(mask) and not mask.requires_grad:
        least, most = (x.item() for x in bias.aminmax()) if bias.numel() else (0.0, 0.0)
        if least == most == 0.0:
            # torch.nn.Transformer turns bool padding into 0 and -inf. The bias of such padding is 0, so it is left out.
            return is_padding, None
        if least >= 0.0 and most == 1.0 and torch.equal(mask, mask.bool().to(mask.dtype)):
            _warn_of_zeros_and_ones()
        if least == torch.finfo(mask.dtype).min:
            _warn_of_lowest_number()
    return is_padding, bias


@functools.cache
def _warn_of_zeros_and_ones() -> None:
    """Warns once that a floating-point key_padding_mask of 0 and 1 is probably a tokenizer's attention_mask."""
    warnings.warn(
        "key_padding_mask: the floating-point values 0 and 1 are added to the scores and hide no key. If this is a "
        "tokenizer's attention_mask (1 = token, 0 = padding), pass `attention_mask == 0`.",
        stacklevel=2,
    )


@functools.cache
def _warn_of_lowest_number() -> None:
    """Warns once that finfo.min in a key_padding_mask costs the time that padding saves."""
    warnings.warn(
        "key_padding_mask: the lowest finite number (torch.finfo(dtype).min) is added to the scores, so the kernels "
        "still compute the keys of the padding. Pass bool (True = ignore) or -inf: then these keys are left out.",
        stacklevel=2,
    )
