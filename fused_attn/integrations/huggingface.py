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
import warnings
from collections.abc import Collection, Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from fused_attn.api import fused_attention, fused_attention_varlen
from fused_attn.backends.dispatch import BACKEND_NAMES

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    from fused_attn.integrations.huggingface_masks import (
        are_of_one_sequence,
        attention_mask_of,
        masks_of,
        packed_masks_of,
    )
    from fused_attn.integrations.huggingface_models import INTERFACE, MISREADS_MASKS, kind_of
except ImportError as error:
    raise ImportError(
        f"fused_attn.integrations.huggingface needs transformers 5.15 or newer ({error}); the extra brings it: "
        "pip install -e '.[huggingface]'"
    ) from error

#: The name for ``attn_implementation``. A name such as ``"fused_attn.cpu"`` insists on one backend.
NAME = "fused_attn"

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
            or misread the masks. A replaced ``forward`` of an attention layer counts, too. The model has not been
            changed.

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
    attentions = _own_attentions(model)
    own, overridden = (
        sorted({type(module).__name__ for module in attentions if _overrides_interface(module) == is_overridden})
        for is_overridden in (False, True)
    )
    refused += overridden
    if not gpt1 and not any(_looks_up(module, (INTERFACE,)) for module in model.modules()):
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
        masks = packed_masks_of(module, attention_mask, query, is_causal)
        _check_given(cu_seq_lens_k=cu_seq_lens_k)
        if "attn_mask" in masks:
            mask = masks["attn_mask"] & are_of_one_sequence(cu_seq_lens_q, cu_seq_lens_k, masks["attn_mask"].shape)
            out = fused_attention(query, key, value, attn_mask=mask, **options)
            return out.transpose(1, 2).contiguous(), None
        _check_given(max_length_q=max_length_q, max_length_k=max_length_k)
        query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (total, heads, D)
        out = fused_attention_varlen(
            query, key, value, cu_seq_lens_q, cu_seq_lens_k, int(max_length_q), int(max_length_k),  # type: ignore[arg-type]
            diagonal_alignment="lower_right", **masks, **options,
        )  # fmt: skip
        return out.unsqueeze(0).contiguous(), None

    # A single query is the newest token, which sees every key.
    masks = masks_of(module, attention_mask, query, is_causal and query.shape[2] > 1)
    if position_bias is not None and position_bias.numel() > 0:
        if position_bias.ndim == 2:
            options["relative_bias"] = position_bias
        else:
            masks["attn_mask"] = _with_position_bias(position_bias, masks.get("attn_mask"))
    out = fused_attention(query, key, value, **masks, **options)
    return out.transpose(1, 2).contiguous(), None


def _check_given(**arguments: Any) -> None:
    """Raises ValueError if an argument of packed sequences is missing."""
    for name, x in arguments.items():
        if x is None:
            raise ValueError(f"{name}: expected an argument beside cu_seq_lens_q, got None")


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


def _register() -> None:
    """Registers the names "fused_attn", "fused_attn.cpu" and so on with transformers."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask_of)
    for backend in BACKEND_NAMES:
        AttentionInterface.register(f"{NAME}.{backend}", functools.partial(attention, backend=backend))
        AttentionMaskInterface.register(f"{NAME}.{backend}", attention_mask_of)


_register()


def _with_position_bias(position_bias: Tensor, mask: Tensor | None) -> Tensor:
    """The position bias and the mask as one tensor that is added to the scores."""
    if mask is None:
        return position_bias
    if mask.dtype == torch.bool:
        return position_bias.masked_fill(~mask, float("-inf"))
    return position_bias + mask


def _is_switchable(model: PreTrainedModel) -> bool:
    """Whether the attention of a model can be chosen by name, and reads our masks correctly."""
    return model._can_set_attn_implementation() and kind_of(model.config) not in MISREADS_MASKS


def _own_attentions(model: nn.Module) -> list[nn.Module]:
    """The attention layers in `model` that compute attention by themselves.

    Some files use the interface for one part of a model only: those of SAM and LongT5 use it for the decoder.
    """
    own = ("softmax", "scaled_dot_product_attention")
    return [
        module
        for module in model.modules()
        if re.search("Attention|Attn", type(module).__name__) and not _is_gpt1(module)
        and _looks_up(module, own) and not _looks_up(module, (INTERFACE,))
    ]  # fmt: skip


def _overrides_interface(module: nn.Module) -> bool:
    """Whether a layer with attention of its own has a class that uses the interface.

    Someone has then replaced the forward of the class. The model makes its masks for the class, so the replacement
    would get masks that it misreads.
    """
    codes = (_code(method) for base in _bases(module) for method in vars(base).values() if inspect.isfunction(method))
    return any(code is not None and INTERFACE in code.co_names for code in codes)


def _looks_up(module: nn.Module, names: Collection[str]) -> bool:
    """Whether the forward of a module, or a method that it calls, looks one of the names up."""
    methods, todo = {"forward"}, ["forward"]
    while todo:
        for code in _codes(module, todo.pop()):
            if not set(names).isdisjoint(code.co_names):
                return True
            called = {name for name in code.co_names if hasattr(type(module), name)} - methods
            methods |= called
            todo += called
    return False


def _codes(module: nn.Module, name: str) -> Iterator[CodeType]:
    """The code that a call of a method runs: that of the instance or of the first class that has the method.

    The code of the next class follows if the code before calls the method of another class.
    """
    for owner in (module, *_bases(module)):
        if name not in vars(owner):
            continue
        code = _code(vars(owner)[name])
        if code is not None:
            yield code
        if code is None or {"super", name}.isdisjoint(code.co_names):
            return


def _bases(module: nn.Module) -> list[type]:
    """The classes whose methods count: not those of torch, and not `PreTrainedModel`."""
    return [x for x in type(module).__mro__ if x is not PreTrainedModel and not x.__module__.startswith("torch.")]


def _code(function: Any) -> CodeType | None:
    """The code of a function or a method. The hooks of accelerate, and functools.wraps, count as what they wrap."""
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    return code if isinstance(code, CodeType) else None


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
    return INTERFACE in code.co_names and takes[1:] == ("query_length", "key_length", "device", "past_seen_tokens")


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
