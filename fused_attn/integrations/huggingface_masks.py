"""The masks of Hugging Face models: a mask function for transformers, and what its masks are for `fused_attention`.

transformers hands one tensor from the mask function to the attention function. A dense one is (B, H, L, S). To take
O(S) or O(B L) memory, three kinds of masks are tensors of five dimensions, whose sizes carry numbers. For each kind,
three functions stand side by side. The first makes the tensor, the second knows it again, and the third reads it.

| mask | tensor | functions |
|---|---|---|
| a causal mask or a window, with padding | (B, sides, 11, reach + 2, S) bool | `_band`, `is_band`, `band_of` |
| the tokens after a static cache | (B, 1, 11, 1, 1) int32, L >= 1 | `_lengths`, `_is_lengths`, `_masks_of_lengths` |
| packed sequences | (B, 1, L, 1 + window, 2) int32, L > 1 | `_packed_ranges`, `_is_packed`, `_packed_band` |

The 11 is `_NO_HEADS`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import masking_utils
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
    prepare_padding_mask,
    sdpa_mask,
    sliding_window_overlay,
)

from fused_attn.attention.key_ranges import key_ranges_of_segments
from fused_attn.integrations.huggingface_models import check_reads_masks, kind_of, needs_dense_masks

#: Attention that does not know these masks may add them to its scores (B, H, L, S). A dimension of this size then meets
#: the heads and raises an error. A size of 1 would broadcast to wrong results. Hardly any model has 11 heads. The
#: dimension is expanded, so it takes no memory.
_NO_HEADS = 11


def attention_mask_of(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **options,
) -> Tensor | None:
    """A mask function of transformers' ``AttentionMaskInterface`` that keeps common masks at O(S) memory.

    The contents of a mask are not read, so no decoding step waits for a device because of a mask. The arguments are
    those of transformers' own mask functions.

    Args:
        options: the other arguments. ``config`` is the configuration of the model. If ``allow_is_causal_skip`` is
            False, a causal mask is made dense. If ``allow_is_bidirectional_skip`` is False, a mask that hides nothing
            is made dense, too. The rest is passed on to ``sdpa_mask``.

    Returns:
        One of six:

        - None: nothing is hidden.
        - A band, (B, sides, 11, reach + 2, S) bool. True = the key is no padding. Without padding, B and S are 1. The
          sizes of the other dimensions carry the numbers:
          ``sides`` is 1 for a causal band (upper left) and 2 for a band on both sides;
          ``reach`` is how far a query sees on each side, and -1 means all.
          A band is expanded, so it takes O(B S) memory. A band that is given as `attention_mask` is returned.
        - (B|1, 1, 11, 1, 1) int32: the number of keys so far. The queries are the newest ones, and causal.
        - (B, 1, 1, S) bool: padding. True = attend.
        - (B|1, 1, L, 1 + window, 2) int32, L > 1: sequences that are packed into one batch entry, causal. For each
          query, begin and end of its sequence. The range is expanded, to carry the window by the size of a dimension:
          how many keys a query sees, and 0 means all. So the mask takes O(B L) memory.
        - (B, 1, L, S) bool, made by transformers' own ``sdpa_mask``: every other mask. True = attend.

    Raises:
        ValueError: the model has attention of its own, which would misread the mask, or `attention_mask` has another
            shape.
    """
    config, device = options.pop("config", None), options.get("device")
    allow_is_causal_skip = options.get("allow_is_causal_skip", True)
    allow_is_bidirectional_skip = options.get("allow_is_bidirectional_skip", False)
    check_reads_masks(type(config), kind_of(config))
    if attention_mask is not None and attention_mask.ndim == 5:
        return attention_mask  # generate() made the mask before it called the model
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(f"attention_mask: expected (B, S) or (B, 1, L, S), got {tuple(attention_mask.shape)}")
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length]
    # Only sliding windows and chunks have a local size, and only models with chunks have attention_chunk_size. If a
    # mask may be skipped, no other mask has been combined with it.
    is_window = (
        local_size is not None
        and local_size == getattr(config, "sliding_window", None)
        and getattr(config, "attention_chunk_size", None) is None
    )
    size: Any = local_size
    needs_dense = needs_dense_masks(type(config), kind_of(config))
    if allow_is_bidirectional_skip and mask_function is bidirectional_mask_function and not needs_dense:
        return None if padding is None else padding[:, None, None]
    if q_length > 1 and kv_offset == 0 and _is_zero(q_offset) and not needs_dense:
        if allow_is_bidirectional_skip and is_window:
            if max(q_length, kv_length) > size + 1:
                return _band(padding, 2, size, device)
            return None if padding is None else padding[:, None, None]
        if allow_is_causal_skip and (is_window or mask_function is causal_mask_function):
            reach = size - 1 if is_window and q_length > size else -1
            return _band(padding, 1, reach, device)
    if (
        padding is None and local_size is None and kv_offset == 0 and not needs_dense
        and mask_function is causal_mask_function and isinstance(q_offset, Tensor)
    ):  # fmt: skip
        # The tokens after a static cache. Its length is a tensor, which nobody reads on the host.
        return _lengths(q_offset + q_length)
    if q_length == 1 and allow_is_causal_skip and padding is None and (local_size is None or kv_length < local_size):
        return None
    # With use_vmap, the caller has given mask functions of his own, in which the same sequence may return later.
    is_own = options.get("use_vmap", False)
    packed = None if needs_dense or is_own or padding is not None else _packed(mask_function)
    if packed is not None and 1 < q_length == kv_length and kv_offset == 0 and _is_zero(q_offset):
        return _packed_ranges(packed.sequences, packed.window if packed.window < q_length else 0)
    options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, local_size=local_size, **options,
    )  # fmt: skip


def _is_zero(offset: int | Tensor) -> bool:
    """Whether the offset is 0. A static cache counts in a tensor, whose value compiled code cannot read."""
    if isinstance(offset, Tensor):
        return not torch.compiler.is_compiling() and bool(offset == 0)
    return offset == 0


def masks_of(module: nn.Module, mask: Tensor | None, query: Tensor, is_causal: bool) -> dict[str, Any]:
    """The arguments of `fused_attention` for a mask, whether `attention_mask_of` or other code has made it."""
    if mask is None:
        return {"is_causal": is_causal}
    if mask.ndim == 4:
        if mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1:
            return {"key_padding_mask": ~mask[:, 0, 0].expand(query.shape[0], -1)}
        return {"attn_mask": mask}
    if _is_packed(mask):
        return _packed_band(mask) | {"key_ranges": mask[:, :, :, :1]}
    if _is_lengths(mask):
        return _masks_of_lengths(mask, query)
    if not is_band(mask):
        raise ValueError(
            f"attention_mask: expected a mask of transformers' mask functions or of shape (B, H, L, S), got "
            f"{mask.dtype} of shape {tuple(mask.shape)} from {type(module).__name__}"
        )
    if mask.shape[4] == 1:
        return band_of(mask)
    return band_of(mask) | {"key_padding_mask": ~mask[:, 0, 0, 0].expand(query.shape[0], -1)}


def packed_masks_of(module: nn.Module, mask: Tensor | None, query: Tensor, is_causal: bool) -> dict[str, Any]:
    """The masks for a call with cu_seq_lens_q.

    These are the arguments of `fused_attention_varlen`, or only an ``attn_mask`` (1, 1, L, S) that may let queries see
    keys of other sequences.
    """
    if mask is not None and _is_packed(mask):
        return _packed_band(mask)
    if mask is not None and mask.ndim == 4 and mask.shape[2] > 1 and mask.dtype == torch.bool:
        if getattr(getattr(module, "config", None), "attention_chunk_size", None) is not None:
            raise ValueError(
                f"cu_seq_lens_q: expected None for chunked attention in {type(module).__name__}, whose mask does not "
                f"tell where its chunks begin; got one; leave out cu_seq_lens_q and give position_ids alone"
            )
        return {"attn_mask": mask}
    masks = masks_of(module, mask, query, is_causal)
    if masks.keys() & {"attn_mask", "key_padding_mask", "key_lengths"}:
        raise ValueError(
            f"attention_mask: expected no padding and no additive mask with cu_seq_lens_q, got a mask in "
            f"{type(module).__name__}; if you gave none, the model has made one, and takes no packed sequences"
        )
    return masks


def are_of_one_sequence(offsets_q: Tensor, offsets_k: Any, shape: torch.Size) -> Tensor:
    """(L, S) bool: whether query and key are of the same sequence. shape: that of a mask, (1, 1, L, S)."""
    number_q, number_k = (
        torch.bucketize(torch.arange(length, device=offsets.device), offsets, right=True)
        for offsets, length in ((offsets_q, shape[2]), (offsets_k, shape[3]))
    )
    return number_q[:, None] == number_k


# ---- Bands


def _band(padding: Tensor | None, sides: int, reach: int, device: torch.device | str | None) -> Tensor:
    """A band as `attention_mask_of` returns it: (B, sides, 11, reach + 2, S), or (1, sides, 11, reach + 2, 1)."""
    if padding is None:
        padding = torch.ones((1, 1), dtype=torch.bool, device=device)
    return padding[:, None, None, None].expand(-1, sides, _NO_HEADS, reach + 2, -1)


def is_band(mask: Tensor) -> bool:
    """Whether a mask of `attention_mask_of` is a band."""
    return mask.ndim == 5 and mask.dtype == torch.bool


def band_of(mask: Tensor) -> dict[str, Any]:
    """The arguments of `fused_attention` for a band of `attention_mask_of`, without its padding."""
    is_causal, reach = mask.shape[1] == 1, mask.shape[3] - 2
    return {"is_causal": True} if reach < 0 else {"window_size": (reach, 0 if is_causal else reach)}


# ---- Lengths of static caches


def _lengths(lengths: Tensor) -> Tensor:
    """The numbers of keys so far, () or (B,), as `attention_mask_of` returns them: (B|1, 1, 11, 1, 1) int32."""
    return lengths.to(torch.int32).view(-1, 1, 1, 1, 1).expand(-1, -1, _NO_HEADS, -1, -1)


def _is_lengths(mask: Tensor) -> bool:
    """Whether a mask of `attention_mask_of` holds numbers of keys."""
    return mask.ndim == 5 and mask.dtype == torch.int32 and mask.shape[4] == 1


def _masks_of_lengths(mask: Tensor, query: Tensor) -> dict[str, Any]:
    """The arguments of `fused_attention` for numbers of keys. The queries are the newest tokens."""
    lengths = {"key_lengths": mask[:, 0, 0, 0, 0].expand(query.shape[0])}
    return lengths if query.shape[2] == 1 else lengths | {"is_causal": True, "diagonal_alignment": "lower_right"}


# ---- Packed sequences


def _packed_ranges(sequences: Tensor, window: int) -> Tensor:
    """Packed sequences as `attention_mask_of` returns them: (B|1, 1, L, 1 + window, 2) int32. See `_Packed`."""
    return key_ranges_of_segments(sequences)[:, None].expand(-1, -1, -1, 1 + window, -1)


def _is_packed(mask: Tensor) -> bool:
    """Whether a mask of `attention_mask_of` holds the ranges of packed sequences."""
    return mask.ndim == 5 and mask.dtype == torch.int32 and mask.shape[4] == 2


def _packed_band(mask: Tensor) -> dict[str, Any]:
    """The arguments of `fused_attention` for the band of packed sequences."""
    window = mask.shape[3] - 1
    return {"is_causal": True} if window == 0 else {"window_size": (window - 1, 0)}


class _Packed(NamedTuple):
    """Sequences that are packed into one row and causal.

    sequences: (B, L) integers, the number of the sequence of each token
    window: how many keys a query sees; 0 = all
    """

    sequences: Tensor
    window: int


def _packed(mask_function) -> _Packed | None:
    """The packed sequences of a mask function. None means another mask.

    Only the mask functions of transformers are known, so whatever a model adds to them makes another mask. While torch
    compiles, every mask is another mask, because dynamo shows no closures.
    """
    packed = None if torch.compiler.is_compiling() else _closure(mask_function, and_masks())
    if packed is None or len(packed["mask_functions"]) != 2:
        return None
    inner, same_sequence = packed["mask_functions"]
    sequences = (_closure(same_sequence, packed_sequence_mask_function(None)) or {}).get("packed_sequence_mask")
    if sequences is None:
        return None
    # Newer versions count positions from the start of each sequence. This changes neither of the two masks below.
    if hasattr(masking_utils, "remap_positions_for_packed_sequence"):
        remapped = _closure(inner, masking_utils.remap_positions_for_packed_sequence(None, None))
        inner = inner if remapped is None else remapped["mask_function"]
    if inner is causal_mask_function:
        return _Packed(sequences, 0)
    parts = (_closure(inner, and_masks()) or {}).get("mask_functions", ())
    if len(parts) != 2 or parts[1] is not causal_mask_function:
        return None
    window = _closure(parts[0], sliding_window_overlay(1))
    if window is None or window["sliding_window"] < 1:
        return None
    return _Packed(sequences, window["sliding_window"])


def _closure(function: Any, like: Any) -> dict[str, Any] | None:
    """The variables that `function` has from around it, if it has the code of `like`; otherwise None."""
    if not hasattr(function, "__code__") or function.__code__ is not like.__code__:
        return None
    names = like.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, function.__closure__, strict=True)}
