"""Puts the fused kernel under the models of Hugging Face transformers.

>>> from transformers import BertConfig, BertModel
>>> from fused_attn.integrations import huggingface
>>> config = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
>>> model = huggingface.enable(BertModel(config))  # or BertModel.from_pretrained(...)
>>> model.config._attn_implementation
'fused_attn'

Importing this module also registers the name "fused_attn", for ``from_pretrained(..., attn_implementation=...)``.
`enable` does more than the name can:

- `enable` refuses models that would ignore the name, and models that would be wrong under the name.
- `enable` puts GPT-1 on the fused kernel, although transformers offers no choice of attention for GPT-1.
- `enable` keeps the position bias of T5 and its family at O(L) memory.

This module needs transformers 5.15 or newer: ``pip install -e .[huggingface]``.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import warnings
from collections.abc import Collection
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_attn.api import fused_attention, fused_attention_varlen
from fused_attn.attention.key_ranges import key_ranges_of_segments
from fused_attn.backends.dispatch import BACKEND_NAMES

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
    from transformers.masking_utils import (
        and_masks,
        bidirectional_mask_function,
        causal_mask_function,
        packed_sequence_mask_function,
        prepare_padding_mask,
        sdpa_mask,
        sliding_window_overlay,
    )
except ImportError as error:
    raise ImportError(
        f"fused_attn.integrations.huggingface needs transformers 5.15 or newer ({error}); the extra brings it: "
        "pip install -e '.[huggingface]'"
    ) from error

#: The name for ``attn_implementation``. A name such as ``"fused_attn.cpu"`` insists on one backend.
NAME = "fused_attn"

#: If the source of a model's module contains this name, the attention of the model can be chosen by name.
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"

#: Models that use the interface, or share a file with models that do, but misread its masks. DeepSeek V4 appends
#: columns of numbers to its masks, so a mask must be additive, and must exist even if it hides nothing. The others also
#: give the masks to attention of their own, which would add the masks to its scores.
_MISREADS_MASKS = ("bigbird_pegasus", "deepseek_v4", "gemma4_audio", "git", "informer with ProbSparse attention")

#: Models that cut rows or columns out of their masks, or lay masks of their own over them. Their masks must be dense.
#: `_needs_dense_masks` finds more such models.
_NEEDS_DENSE_MASKS = ("pix2struct_text_model", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "doge")

#: Keyword arguments of attention functions that no argument of `fused_attention` can express:
#: "indices" and "block_indices" are the keys that sparse attention has chosen, "sinks" are sinks for each query.
_REFUSED = ("indices", "block_indices", "sinks")

#: What is laid over a class of transformers uses that class's attributes, which a type checker cannot know.
_Layer: Any = object


def enable(model: nn.Module, backend: str | None = None) -> nn.Module:
    """Switch every transformers model in `model` to the fused kernel, in place.

    - Parameters, state dict and configuration files stay as they are. A model that is loaded again must be enabled
      again.
    - ``model.set_attn_implementation("eager")`` goes back. Up to transformers 5.17, call this on T5's encoder and on
      its decoder, too. GPT-1 cannot go back.
    - Attention weights are never formed, so ``output_attentions=True`` raises ValueError. Models that do not pass this
      option to their attention function, such as GPT-2, return no weights.

    Args:
        model: a ``PreTrainedModel``, or a module that contains some.
        backend: see `fused_attention`.

    Returns:
        The model.

    Raises:
        TypeError: `model` is no module, or contains no transformers model.
        ValueError: there is no backend of this name, or a model has attention of its own, which would ignore the choice
            or misread the masks. The model has not been changed.

    Warns:
        UserWarning: a part of a model has attention of its own, and keeps it. The message names the classes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if backend is not None and backend not in BACKEND_NAMES:
        raise ValueError(f"backend: expected None or one of {BACKEND_NAMES}, got {backend!r}")
    pretrained = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not pretrained:
        raise TypeError(f"model: expected a transformers model or a module that holds one, got {type(model).__name__}")
    gpt1: list[Any] = [module for module in model.modules() if _is_gpt1_attention(module)]
    switchable = [module for module in pretrained if not _is_gpt1(module)]
    refused = sorted({type(module).__name__ for module in switchable if not _is_switchable(module)})
    own = _classes_with_own_attention(model)
    if not gpt1 and not any(_looks_up(cls, (_INTERFACE,)) for cls in {type(module) for module in model.modules()}):
        refused += own
    if refused:
        raise ValueError(
            f"model: expected models that leave the choice of attention to transformers' AttentionInterface, got "
            f"{', '.join(refused)}, whose own attention would ignore the fused kernel or misread its masks"
        )
    if own:
        warnings.warn(f"model: these classes keep attention of their own: {', '.join(own)}", stacklevel=2)
    name = NAME if backend is None else f"{NAME}.{backend}"
    before = [module.config._attn_implementation for module in switchable]
    try:
        # Each model is set by itself, the innermost first. Up to transformers 5.17, setting T5 leaves out its encoder
        # and its decoder.
        for module in reversed(switchable):
            module.set_attn_implementation(name)
            if module.config._attn_implementation != name:
                raise ValueError(f"model: {type(module).__name__} did not take the attention {name!r}")
    except Exception:
        for module, previous in zip(switchable, before, strict=True):
            module.config._attn_implementation = previous
        raise
    for module in gpt1:
        module.__class__ = _subclass(_FusedGPT1, type(module))  # type: ignore[arg-type]  # classes do have a hash
        module.backend = backend
    biased: list[Any] = [module for module in model.modules() if _has_relative_bias(module)]
    for module in biased:
        module.__class__ = _subclass(_RelativeBias, type(module))  # type: ignore[arg-type]
    return model


# ---- What transformers calls


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    *,
    backend: str | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """An attention function of transformers' ``AttentionInterface``.

    Args:
        module: the attention layer.
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        attention_mask: None, a result of `attention_mask_of`, or (B|1, H|1, L, S). Bool: True = attend. Floating point:
            added to the scores.
        dropout: the ``dropout_p`` of `fused_attention`.
        scaling: the ``scale`` of `fused_attention`.
        is_causal: whether query i sees only the keys j <= i. A mask overrides this flag. None means the attribute
            ``is_causal`` of `module`.
        position_bias: one of three: (B|1, H, L, S), added to the scores; (H, L + S - 1), the ``relative_bias`` of
            `fused_attention`; or an empty tensor, which means no bias.
        softcap: the ``softcap`` of `fused_attention`.
        s_aux: (H,), the ``sinks`` of `fused_attention`.
        cu_seq_lens_q: (num_sequences + 1,) int32, the row offsets of sequences that are packed into one batch entry.
            Causal masks and windows end at the last query and the last key of each sequence, as in flash_attn.
            With a bool mask (1, 1, L, S), a query sees the keys of its sequence that the mask shows.
        cu_seq_lens_k: the same for the keys.
        max_length_q: the longest of these sequences.
        max_length_k: the same for the keys.
        backend: see `fused_attention`.
        kwargs: the other arguments. ``sliding_window`` is not read, because the mask says what the window is.

    Returns:
        out: (B, L, H, Dv), contiguous.
        weights: None.

    Raises:
        ValueError: the call asks for something that the kernel does not compute.
    """
    numbers = {"dropout": dropout, "scaling": scaling, "softcap": softcap, "s_aux": s_aux}
    options = options_of(query, key, kwargs | numbers, backend)
    out: Any
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if cu_seq_lens_q is not None:
        if position_bias is not None:
            raise ValueError("position_bias: expected None with cu_seq_lens_q, got one")
        if query.shape[0] != 1:
            raise ValueError(
                f"cu_seq_lens_q: expected None or a batch of one entry, which holds all sequences; got "
                f"{query.shape[0]} entries"
            )
        masks = _packed_masks(module, attention_mask, query, is_causal)
        if "attn_mask" in masks:
            mask = masks["attn_mask"] & _are_of_one_sequence(cu_seq_lens_q, cu_seq_lens_k, masks["attn_mask"].shape)
            out = fused_attention(query, key, value, attn_mask=mask, **options)
            return out.transpose(1, 2).contiguous(), None
        query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (total, heads, D)
        # transformers passes all four arguments of packed sequences (cu_seq_lens, max_length) or none of them.
        out = fused_attention_varlen(
            query, key, value, cu_seq_lens_q, cu_seq_lens_k, int(max_length_q), int(max_length_k),  # type: ignore[arg-type]
            diagonal_alignment="lower_right", **masks, **options,
        )  # fmt: skip
        return out.unsqueeze(0).contiguous(), None

    # A single query is the newest token, which sees every key.
    masks = _masks(module, attention_mask, query, is_causal and query.shape[2] > 1)
    if position_bias is not None and position_bias.numel() > 0:
        if position_bias.ndim == 2:
            options["relative_bias"] = position_bias
        else:
            masks["attn_mask"] = _with_position_bias(position_bias, masks.get("attn_mask"))
    out = fused_attention(query, key, value, **masks, **options)
    return out.transpose(1, 2).contiguous(), None


def options_of(query: Tensor, key: Tensor, options: dict[str, Any], backend: str | None) -> dict[str, Any]:
    """The arguments of `fused_attention` for the keyword arguments of an attention function of transformers.

    Raises:
        ValueError: the kernel cannot honour one of them.
    """
    if options.get("output_attentions"):
        raise ValueError('output_attentions: expected False, since no weights are formed; use the attention "eager"')
    for name in _REFUSED:
        if options.get(name) is not None:
            raise ValueError(f"{name}: expected None, since the fused kernel cannot honour it, got one")
    if options.get("cache") is not None:
        raise ValueError(
            "cache: expected None, got a paged cache; transformers allows only its own attention in continuous "
            'batching, such as "sdpa"'
        )
    return {
        "dropout_p": options.get("dropout", 0.0),
        "scale": options.get("scaling"),
        # In torch.jit.trace, sizes are tensors, and so is the result of their comparison.
        "enable_gqa": bool(key.shape[1] != query.shape[1]),
        "softcap": options.get("softcap") or 0.0,
        "sinks": options.get("s_aux"),
        "backend": backend,
    }


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
        - A band, (B, sides, 1, reach + 2, S) bool. True = the key is no padding. Without padding, B and S are 1. The
          sizes of the other dimensions carry the numbers:
          ``sides`` is 1 for a causal band (upper left) and 2 for a band on both sides;
          ``reach`` is how far a query sees on each side, and -1 means all.
          A band is expanded, so it takes O(B S) memory. A band that is given as `attention_mask` is returned.
        - (B|1, 1, 1, 1, 1) int32: the number of keys so far. The queries are the newest ones, and causal.
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
    _check_reads_masks(type(config), _kind(config))
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
    needs_dense = _needs_dense_masks(type(config), _kind(config))
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
        return (q_offset + q_length).to(torch.int32).view(-1, 1, 1, 1, 1)
    if q_length == 1 and allow_is_causal_skip and padding is None and (local_size is None or kv_length < local_size):
        return None
    # With use_vmap, the caller has given mask functions of his own, in which the same sequence may return later.
    is_own = options.get("use_vmap", False)
    packed = None if needs_dense or is_own or padding is not None else _packed(mask_function)
    if packed is not None and 1 < q_length == kv_length and kv_offset == 0 and _is_zero(q_offset):
        ranges = key_ranges_of_segments(packed.sequences)[:, None]  # (B|1, 1, L, 1, 2)
        return ranges.expand(-1, -1, -1, 1 + (packed.window if packed.window < q_length else 0), -1)
    options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, local_size=local_size, **options,
    )  # fmt: skip


def _register() -> None:
    """Registers the names "fused_attn", "fused_attn.cpu" and so on with transformers."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask_of)
    for backend in BACKEND_NAMES:
        AttentionInterface.register(f"{NAME}.{backend}", functools.partial(attention, backend=backend))
        AttentionMaskInterface.register(f"{NAME}.{backend}", attention_mask_of)


_register()


# ---- Masks


def _is_zero(offset: int | Tensor) -> bool:
    """Whether the offset is 0. A static cache counts in a tensor, whose value compiled code cannot read."""
    if isinstance(offset, Tensor):
        return not torch.compiler.is_compiling() and bool(offset == 0)
    return offset == 0


def _band(padding: Tensor | None, sides: int, reach: int, device: torch.device | str | None) -> Tensor:
    """A band as `attention_mask_of` returns it: (B, sides, 1, reach + 2, S), or (1, sides, 1, reach + 2, 1)."""
    if padding is None:
        padding = torch.ones((1, 1), dtype=torch.bool, device=device)
    return padding[:, None, None, None].expand(-1, sides, -1, reach + 2, -1)


def band_of(mask: Tensor) -> dict[str, Any]:
    """The arguments of `fused_attention` for a band of `attention_mask_of`, without its padding."""
    is_causal, reach = mask.shape[1] == 1, mask.shape[3] - 2
    return {"is_causal": True} if reach < 0 else {"window_size": (reach, 0 if is_causal else reach)}


def _masks(module: nn.Module, mask: Tensor | None, query: Tensor, is_causal: bool) -> dict[str, Any]:
    """The arguments of `fused_attention` for a mask, whether `attention_mask_of` or other code has made it."""
    if mask is None:
        return {"is_causal": is_causal}
    if mask.ndim == 4:
        if mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1:
            return {"key_padding_mask": ~mask[:, 0, 0].expand(query.shape[0], -1)}
        return {"attn_mask": mask}
    if _is_packed(mask):
        return _packed_band(mask) | {"key_ranges": mask[:, :, :, :1]}
    if mask.ndim == 5 and mask.dtype == torch.int32 and mask.shape[1:] == (1, 1, 1, 1):
        lengths = mask.flatten().expand(query.shape[0])
        if query.shape[2] == 1:
            return {"key_lengths": lengths}
        return {"key_lengths": lengths, "is_causal": True, "diagonal_alignment": "lower_right"}
    if mask.ndim != 5 or mask.dtype != torch.bool or mask.shape[2] != 1:
        raise ValueError(
            f"attention_mask: expected a mask of transformers' mask functions or of shape (B, H, L, S), got "
            f"{mask.dtype} of shape {tuple(mask.shape)} from {type(module).__name__}"
        )
    if mask.shape[4] == 1:
        return band_of(mask)
    return band_of(mask) | {"key_padding_mask": ~mask[:, 0, 0, 0].expand(query.shape[0], -1)}


def _packed_masks(module: nn.Module, mask: Tensor | None, query: Tensor, is_causal: bool) -> dict[str, Any]:
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
    masks = _masks(module, mask, query, is_causal)
    if masks.keys() & {"attn_mask", "key_padding_mask", "key_lengths"}:
        raise ValueError(
            f"attention_mask: expected no padding and no additive mask with cu_seq_lens_q, got a mask in "
            f"{type(module).__name__}; if you gave none, the model has made one, and takes no packed sequences"
        )
    return masks


class _Packed(NamedTuple):
    """Sequences that are packed into one row and causal.

    sequences: (B, L) integers, the number of the sequence of each token
    window: how many keys a query sees; 0 = all
    """

    sequences: Tensor
    window: int


def _is_packed(mask: Tensor) -> bool:
    """Whether a mask of `attention_mask_of` holds the ranges of packed sequences."""
    return mask.ndim == 5 and mask.dtype == torch.int32 and mask.shape[2] > 1


def _packed_band(mask: Tensor) -> dict[str, Any]:
    """The arguments of `fused_attention` for the band of packed sequences."""
    window = mask.shape[3] - 1
    return {"is_causal": True} if window == 0 else {"window_size": (window - 1, 0)}


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


def _are_of_one_sequence(offsets_q: Tensor, offsets_k: Any, shape: torch.Size) -> Tensor:
    """(L, S) bool: whether query and key are of the same sequence. shape: that of a mask, (1, 1, L, S)."""
    number_q, number_k = (
        torch.bucketize(torch.arange(length, device=offsets.device), offsets, right=True)
        for offsets, length in ((offsets_q, shape[2]), (offsets_k, shape[3]))
    )
    return number_q[:, None] == number_k


def _with_position_bias(position_bias: Tensor, mask: Tensor | None) -> Tensor:
    """The position bias and the mask as one tensor that is added to the scores."""
    if mask is None:
        return position_bias
    if mask.dtype == torch.bool:
        return position_bias.masked_fill(~mask, float("-inf"))
    return position_bias + mask


def _is_switchable(model: PreTrainedModel) -> bool:
    """Whether the attention of a model can be chosen by name, and reads our masks correctly."""
    return model._can_set_attn_implementation() and _kind(model.config) not in _MISREADS_MASKS


def _classes_with_own_attention(model: nn.Module) -> list[str]:
    """The names of attention classes in `model` that compute attention by themselves.

    Some files use the interface for one part of a model only: those of SAM and LongT5 use it for the decoder.
    """
    own = ("softmax", "scaled_dot_product_attention")
    classes = {type(module) for module in model.modules() if not _is_gpt1(module)}
    return sorted(
        cls.__name__
        for cls in classes
        if re.search("Attention|Attn", cls.__name__) and _looks_up(cls, own) and not _looks_up(cls, (_INTERFACE,))
    )


def _looks_up(cls: type, names: Collection[str]) -> bool:
    """Whether a method of a class looks one of the names up. Methods of torch and of `PreTrainedModel` do not count."""
    methods = (
        inspect.unwrap(method)
        for base in cls.__mro__
        if base is not PreTrainedModel and not base.__module__.startswith("torch.")
        for method in vars(base).values()
        if inspect.isfunction(method)
    )
    codes = (getattr(method, "__code__", None) for method in methods)
    return any(code is not None and not set(names).isdisjoint(code.co_names) for code in codes)


def _kind(config) -> str | None:
    """The ``model_type`` of a configuration. Informer with ProbSparse attention counts as a type of its own."""
    kind = getattr(config, "model_type", None)
    is_sparse = kind == "informer" and config.attention_type == "prob"
    return "informer with ProbSparse attention" if is_sparse else kind


@torch.compiler.assume_constant_result
def _check_reads_masks(config: type, kind: str | None) -> None:
    """Raises ValueError if the model of this configuration asks for masks but has attention of its own.

    Such a model expects additive masks, and would add True and False to its scores.
    """
    if kind in _MISREADS_MASKS or _has_own_attention(_model_file(config)):
        raise ValueError(
            f"attn_implementation: expected another one for {config.__name__}, whose model has attention of its own "
            f'and would misread the masks of the fused kernel; use "eager"'
        )


@torch.compiler.assume_constant_result
def _needs_dense_masks(config: type, kind: str | None) -> bool:
    """Whether the model of this configuration reads its masks as (B, 1, L, S).

    Models that lay masks of their own over them ask transformers never to skip a mask. The request does not always
    arrive here: for one token after a static cache, transformers itself forbids to skip masks.
    """
    return kind in _NEEDS_DENSE_MASKS or any(_forbids_skips(_model_file(base)) for base in config.__mro__)


def _model_file(config: type) -> ModuleType | None:
    """The module of a model, if it stands beside the module of its configuration."""
    file = sys.modules.get(config.__module__.replace(".configuration_", ".modeling_"))
    return None if file is None or file.__name__ == config.__module__ else file


def _has_own_attention(file: ModuleType | None) -> bool:
    """Whether the attention that a file defines ignores the interface. Many files only put other models together."""
    if file is None or hasattr(file, _INTERFACE):
        return False
    # transformers reads the same from the source, for all models of a file alike.
    return any(
        isinstance(x, type)
        and issubclass(x, PreTrainedModel)
        and x.__module__ == file.__name__
        and not x._can_set_attn_implementation()  # type: ignore[attr-defined]  # mypy keeps only `type`
        for x in vars(file).values()
    )


@functools.cache
def _forbids_skips(file: ModuleType | None) -> bool:
    """Whether the source of a model asks transformers never to skip a mask."""
    try:
        return file is not None and "allow_is_causal_skip" in inspect.getsource(file)
    except (OSError, TypeError):  # there is no source
        return False


# ---- T5 and its family: a bias for each distance instead of one for each pair of positions


def _has_relative_bias(module: nn.Module) -> bool:
    """Whether a module is an attention layer of T5's family.

    Such a layer computes a position bias and gives the bias to the chosen attention function.
    """
    compute_bias = getattr(type(module), "compute_bias", None)
    if compute_bias is None or isinstance(module, _RelativeBias):
        return False
    # co_names are the names that the code of forward looks up. co_varnames begins with the arguments of compute_bias.
    code = getattr(type(module).forward, "__wrapped__", type(module).forward).__code__
    takes = compute_bias.__code__.co_varnames[: compute_bias.__code__.co_argcount]
    return _INTERFACE in code.co_names and takes[1:] == ("query_length", "key_length", "device", "past_seen_tokens")


class _RelativeBias(_Layer):
    """A mixin for attention layers of T5's family. The position bias of a layer becomes (H, L + S - 1).

    Under another attention, the layer computes its usual bias.
    """

    def compute_bias(self, query_length, key_length, device=None, past_seen_tokens=0):
        """The position bias (H, L + S - 1); (H, 0) in a layer without one."""
        if not self._is_fused:
            return super().compute_bias(query_length, key_length, device, past_seen_tokens)
        if not self.__dict__["has_relative_attention_bias"]:
            return torch.empty(self.n_heads, 0, device=device)
        # One query at position L - 1 meets L + S - 1 keys. These pairs have every distance of L queries and S keys.
        bias = super().compute_bias(1, query_length + key_length - 1, device, past_seen_tokens + query_length - 1)
        return bias[0, :, 0]

    @property
    def has_relative_attention_bias(self) -> bool:
        """Whether the layer calls `compute_bias`. Under the fused attention, every layer does."""
        # A layer without a bias would make zeros for every pair of positions. With True here, the layer calls
        # compute_bias instead, which returns an empty tensor.
        return self._is_fused or self.__dict__["has_relative_attention_bias"]

    @property
    def _is_fused(self) -> bool:
        """Whether the model of this layer uses the fused attention at present."""
        return self.config._attn_implementation.partition(".")[0] == NAME

    def __reduce_ex__(self, protocol):
        return _new_instance, (_RelativeBias, type(self).__mro__[2]), self.__dict__


# ---- GPT-1


def _is_gpt1(module: nn.Module) -> bool:
    """Whether the class of the module stands in the file of GPT-1."""
    return type(module).__module__ == "transformers.models.openai.modeling_openai"


def _is_gpt1_attention(module: nn.Module) -> bool:
    """Whether the module is an attention layer of GPT-1."""
    return _is_gpt1(module) and type(module).__name__ == "Attention"


class _FusedGPT1(_Layer):
    """A mixin for the attention layers of GPT-1, for which transformers offers no choice of attention."""

    backend: str | None = None

    def _attn(self, q, k, v, attention_mask=None, output_attentions=False):
        """[out (B, H, L, D)] of q (B, H, L, D), k (B, H, D, L), v (B, H, L, D), and attention_mask (B, 1, 1, L).

        The mask is added to the scores.
        """
        if output_attentions:
            raise ValueError("output_attentions: expected False, since the fused kernel forms no weights, got True")
        padding = None
        if attention_mask is not None:
            padding = attention_mask[:, 0, 0].expand(q.shape[0], -1)
            # GPT-1 marks padding by the lowest number of the dtype. The kernel skips blocks of padding, but only if the
            # mark is -inf.
            padding = padding.masked_fill(padding == torch.finfo(padding.dtype).min, float("-inf"))
        out = fused_attention(
            q, k.transpose(-2, -1), v,
            dropout_p=self.attn_dropout.p if self.training else 0.0,
            is_causal=True,
            scale=None if self.scale else 1.0,
            key_padding_mask=padding,
            backend=self.backend,
        )  # fmt: skip
        return [out]

    def __reduce_ex__(self, protocol):
        return _new_instance, (_FusedGPT1, type(self).__mro__[2]), self.__dict__


# ---- Classes that combine the class of a layer with one of the mixins above


@functools.cache
def _subclass(mixin: type, layer: type) -> type:
    """A class with the methods of the mixin before those of the layer. The name stays that of the layer."""
    return layer if issubclass(layer, mixin) else type(layer.__name__, (mixin, layer), {})


def _new_instance(mixin: type, layer: type) -> nn.Module:
    """An empty instance, for copies and pickles. Pickle cannot find a class of `_subclass` by a name."""
    cls: Any = _subclass(mixin, layer)
    return cls.__new__(cls)
