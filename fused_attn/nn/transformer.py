"""`torch.nn.Transformer` and its parts on `FusedMultiheadAttention`.

These are thin subclasses. Parameters, feed-forward blocks and initialisation are those of the parents. Three things
differ:

- Attention always runs on the fused kernel. There is no inference fast path, and there are no nested tensors.
- Bool masks stay bool, so that the kernel can skip padding.
- Decoders take a cache.

A stack passes plain tensors to its layers, because hooks, checkpoints and mixed precision handle tensors. If the
contents of a mask turn out to be causal, the stack may pass None and is_causal=True in its place. Two attributes of a
layer say what the stack may pass:

- ``takes_is_causal``: is_causal=True without a mask. All layers of the stack must have this attribute set. Otherwise
  they all get what torch's own stacks pass.
- ``takes_cache``: a cache.

Wrappers of a layer pass these attributes on.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import has_torch_function_variadic

from fused_attn import modes
from fused_attn.attention import checks
from fused_attn.attention.causal_bias import causal_bias
from fused_attn.nn import element_dropout, few_rows, native_layer
from fused_attn.nn.arguments import (
    accepts_cache,
    batch_layout,
    check_backend,
    check_divides,
    check_mask_dtype,
    check_sizes,
)
from fused_attn.nn.attention import AttentionCache, FusedMultiheadAttention, keep_fast_path_off
from fused_attn.nn.paged_self_attention import paged_hint
from fused_attn.nn.replacement import replace_attention
from fused_attn.nn.restoring import restoring_layers
from fused_attn.nn.tracing import call_node

if TYPE_CHECKING:
    from fused_attn.nn.cache import CrossAttentionCache, KVCache, LayerCache


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` on the fused kernel, in training and in inference.

    Constructor, forward contract and state-dict keys are those of the parent class.

    >>> import torch
    >>> from fused_attn import TransformerEncoderLayer
    >>> layer = TransformerEncoderLayer(64, 4, batch_first=True)
    >>> is_padding = torch.arange(10) >= torch.tensor([[10], [7]])  # (N, S), True = ignore this key
    >>> layer(torch.randn(2, 10, 64), src_key_padding_mask=is_padding, is_causal=True).shape
    torch.Size([2, 10, 64])

    Args:
        d_model: E. This argument and the next ones are those of the parent class.
        backend: see `fused_attention`.

    Raises:
        TypeError: a size is no int, a flag is no bool, or activation is neither a name nor a callable.
        ValueError: an argument has a value that does not fit.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        backend: str | None = None,
    ):
        check_layer(d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps)
        checks.check_flags(batch_first=batch_first, norm_first=norm_first, bias=bias)
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        self.self_attn = FusedMultiheadAttention.from_torch(self.self_attn, backend)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """The layer's output, laid out as src: (S, N, E), or (N, S, E) with batch_first, or (S, E).

        Args:
            src: the sequences.
            src_mask: (S, S) or (N * nhead, S, S). Bool: True = may NOT attend. Floating point: added to the scores.
            src_key_padding_mask: (N, S) or (S,). Bool: True = ignore the key. Floating point: added to the scores.
            is_causal: a hint that src_mask is the causal mask, see `FusedMultiheadAttention`. Without a src_mask,
                is_causal=True means the causal mask itself.

        Raises:
            AssertionError, RuntimeError: src or a mask does not fit, see `FusedMultiheadAttention`.
        """
        if has_torch_function_variadic(src):
            node = call_node(self, src, src_mask, src_key_padding_mask, is_causal)
            if node is not None:
                return node
        checks.check_tensor("src", src)
        checks.check_tensors(src_mask=src_mask, src_key_padding_mask=src_key_padding_mask)
        checks.check_flag("is_causal", is_causal)
        masks = src_mask, src_key_padding_mask, is_causal
        is_native = native_layer.is_plain(self, ENCODER_BLOCKS)
        step = native_layer.self_attention(self, src, masks) if is_native else None
        x = step.run() if step else _residual(self, src, self.norm1, lambda y: self._sa_block(y, *masks))
        step = native_layer.feed_forward(self, x) if is_native else None
        return step.run() if step else _residual(self, x, self.norm2, self._ff_block)

    def _sa_block(
        self, x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool = False
    ) -> Tensor:
        """The self-attention of x, after dropout, in the shape of x."""
        masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        out = self.self_attn(x, x, x, need_weights=False, is_causal=is_causal, **masks)[0]
        return element_dropout.call(self.dropout1, out)

    def _ff_block(self, x: Tensor) -> Tensor:
        """The feed-forward block of x, after dropout, in the shape of x."""
        return _feed_forward(self, x, self.dropout2)

    @property
    def takes_is_causal(self) -> bool:
        """Whether is_causal=True without a mask is the causal mask."""
        return getattr(self.self_attn, "takes_is_causal", False)


ENCODER_BLOCKS = native_layer.blocks_of(TransformerEncoderLayer)


class TransformerEncoder(nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder` on the fused kernel.

    Constructor, forward contract and state-dict keys are those of the parent class. In eval mode, the parent class may
    compute on nested tensors and fill padded positions of the output with zeros. This class does not: padded positions
    hold in eval mode what they hold in training mode.

    >>> import torch
    >>> from fused_attn import TransformerEncoder, TransformerEncoderLayer
    >>> encoder = TransformerEncoder(TransformerEncoderLayer(64, 4, batch_first=True), num_layers=2)
    >>> is_padding = torch.arange(10) >= torch.tensor([[10], [7]])  # (N, S), True = ignore this key
    >>> encoder(torch.randn(2, 10, 64), src_key_padding_mask=is_padding).shape
    torch.Size([2, 10, 64])

    Args:
        encoder_layer: copied num_layers times. One of torch's own layers is accepted, too: `convert_attention`
            converts its attention.
        num_layers: the number of layers.
        norm: applied to the output of the last layer.
        enable_nested_tensor: accepted for compatibility, without effect.
        mask_check: accepted for compatibility, without effect.
        backend: see `fused_attention`. None leaves the backend of encoder_layer as it is.

    Raises:
        TypeError: num_layers is no int, or a layer or norm is no module.
        ValueError: num_layers is negative, or there is no backend of this name.
    """

    def __init__(
        self,
        encoder_layer: nn.TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
        *,
        backend: str | None = None,
    ):
        _check_stack("encoder_layer", encoder_layer, num_layers, norm)
        checks.check_flags(enable_nested_tensor=enable_nested_tensor, mask_check=mask_check)
        # With True, the parent class would warn about layers that its fast path cannot take.
        super().__init__(encoder_layer, num_layers, norm, enable_nested_tensor=False, mask_check=mask_check)
        self.enable_nested_tensor = enable_nested_tensor
        _fuse(self.layers, backend)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """The output of the last layer, laid out as src: (S, N, E), or (N, S, E) with batch_first, or (S, E).

        Args:
            src: the sequences.
            mask: (S, S) or (N * nhead, S, S). Bool: True = may NOT attend. Floating point: added to the scores.
            src_key_padding_mask: (N, S) or (S,). Bool: True = ignore the key. Floating point: added to the scores.
            is_causal: a hint that mask is the causal mask. None means: compare the contents of the mask. Without a
                mask, is_causal=True means the causal mask itself.

        Raises:
            AssertionError: src is a nested tensor, or src or a mask does not fit.
            RuntimeError: src or a mask does not fit, see `FusedMultiheadAttention`.
        """
        if has_torch_function_variadic(src):
            node = call_node(self, src, mask, src_key_padding_mask, is_causal)
            if node is not None:
                return node
        checks.check_tensor("src", src)
        checks.check_tensors(mask=mask, src_key_padding_mask=src_key_padding_mask)
        _check_compared("mask", mask)
        _check_hint("is_causal", is_causal)
        if src.is_nested:
            raise AssertionError("src: expected a padded tensor with a src_key_padding_mask, got a nested tensor")
        seqlen = _seqlen(src, self.layers)
        if not all(getattr(layer, "takes_is_causal", False) for layer in self.layers):
            # Layers of other classes get the masks in the form that the parent class passes.
            mask = _dense_mask(mask, is_causal, seqlen, src.device)
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        mask, is_causal = _causal_mask(mask, is_causal, src_key_padding_mask, seqlen)
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal)
        return src if self.norm is None else self.norm(src)

    #: Whether is_causal=True without a mask is the causal mask. This holds for layers of any class.
    takes_is_causal = True


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` on the fused kernel, with a cache for decoding step by step.

    Constructor, forward contract and state-dict keys are those of the parent class. Copies of this layer, such as those
    in a stack, keep an activation that is a module (``nn.GELU()``). Copies of the parent class compute relu instead.

    >>> import torch
    >>> from fused_attn import TransformerDecoderLayer
    >>> layer = TransformerDecoderLayer(64, 4, batch_first=True)
    >>> tgt, memory = torch.randn(2, 5, 64), torch.randn(2, 10, 64)
    >>> layer(tgt, memory, tgt_is_causal=True).shape
    torch.Size([2, 5, 64])

    Args:
        d_model: E. This argument and the next ones are those of the parent class.
        backend: see `fused_attention`.

    Raises:
        TypeError: a size is no int, a flag is no bool, or activation is neither a name nor a callable.
        ValueError: an argument has a value that does not fit.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        backend: str | None = None,
    ):
        check_layer(d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps)
        checks.check_flags(batch_first=batch_first, norm_first=norm_first, bias=bias)
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        self.self_attn = FusedMultiheadAttention.from_torch(self.self_attn, backend)
        self.multihead_attn = FusedMultiheadAttention.from_torch(self.multihead_attn, backend)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The parent class takes an activation that is a module for a missing one, and puts relu in front of it. Every
        # copy, such as the layers of a stack, would compute relu.
        if "activation" in state.get("_modules", {}):
            nn.Module.__setstate__(self, state)
        else:
            super().__setstate__(state)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """The layer's output, laid out as tgt: (T, N, E), or (N, T, E) with batch_first, or (T, E).

        Args:
            tgt: the target sequences. With a cache: only their new rows.
            memory: the encoder's output, (S, N, E), or (N, S, E) with batch_first, or (S, E).
            tgt_mask: (T, T) or (N * nhead, T, T). Bool: True = may NOT attend. Floating point: added to the scores.
            memory_mask: (T, S) or (N * nhead, T, S), with the same meaning as tgt_mask.
            tgt_key_padding_mask: (N, T) or (T,). Bool: True = ignore the key. Floating point: added to the scores.
                With a cache, the mask covers all rows so far.
            memory_key_padding_mask: (N, S) or (S,), with the same meaning as tgt_key_padding_mask.
            tgt_is_causal: a hint that tgt_mask is the causal mask, see `FusedMultiheadAttention`. Without a tgt_mask,
                tgt_is_causal=True means the causal mask itself.
            memory_is_causal: the same hint for memory_mask.
            cache: the part of a `KVCache` that belongs to this layer, ``cache.layers[i]``. Self-attention is then
                causal without a tgt_mask. Keys and values of the memory are computed in the first step alone, unless
                ``multihead_attn`` is of a class that takes no cache.

        Raises:
            AssertionError, RuntimeError: tgt, memory or a mask does not fit, see `FusedMultiheadAttention`.
            TypeError: `cache` is not the cache of a layer.
            ValueError: the cache does not fit the call.
        """
        if has_torch_function_variadic(tgt, memory):
            masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
            options = {} if cache is None else {"cache": cache}
            node = call_node(self, tgt, memory, *masks, tgt_is_causal, memory_is_causal, **options)
            if node is not None:
                return node
        checks.check_tensor("tgt", tgt)
        checks.check_tensor("memory", memory)
        _check_decoder_masks(tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, memory_is_causal)
        checks.check_flag("tgt_is_causal", tgt_is_causal)
        if cache is not None and not hasattr(cache, "self_attention"):
            raise TypeError(
                "cache: expected a layer's cache such as cache.layers[i], got "
                f"{type(cache).__name__}{paged_hint(cache)}"
            )
        if cache is not None and type(self) is TransformerDecoderLayer:
            cross_cache = cache.cross_attention
            check_memory(self, tgt, memory, memory_mask, memory_key_padding_mask, memory_is_causal, cross_cache)
        # A subclass may override _mha_block with torch's signature, which has no cache. So the cache is passed only if
        # the method accepts it.
        own: dict[str, Any] = {} if cache is None else {"cache": cache.self_attention}
        cross: dict[str, Any] = {}
        if cache is not None and accepts_cache(self._mha_block):
            cross["cache"] = cache.cross_attention
        own_masks = tgt_mask, tgt_key_padding_mask, tgt_is_causal
        cross_masks = memory_mask, memory_key_padding_mask, memory_is_causal
        with contextlib.nullcontext() if cache is None else restoring_layers([cache]):
            is_native = native_layer.is_plain(self, DECODER_BLOCKS)
            step = native_layer.self_attention(self, tgt, own_masks, own.get("cache")) if is_native else None
            x = step.run() if step else _residual(self, tgt, self.norm1, lambda y: self._sa_block(y, *own_masks, **own))
            step = native_layer.cross_attention(self, x, memory, cross_masks, cross.get("cache")) if is_native else None
            if step:
                y = step.run()
            else:
                y = _residual(self, x, self.norm2, lambda z: self._mha_block(z, memory, *cross_masks, **cross))
            step = native_layer.feed_forward(self, y) if is_native else None
            return step.run() if step else _residual(self, y, self.norm3, self._ff_block)

    @property
    def takes_is_causal(self) -> bool:
        """Whether tgt_is_causal=True without a mask is the causal mask."""
        return getattr(self.self_attn, "takes_is_causal", False)

    @property
    def takes_cache(self) -> bool:
        """Whether a cache may be passed. The class of the self-attention decides this."""
        accepts = accepts_cache(self.forward) and accepts_cache(self._sa_block)
        return accepts and getattr(self.self_attn, "takes_cache", False)

    def _sa_block(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool = False,
        *,
        cache: AttentionCache | None = None,
    ) -> Tensor:
        """The self-attention of x, after dropout, in the shape of x. The parent class has no cache."""
        masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        options: dict[str, Any] = {"is_causal": is_causal}
        if cache is not None:
            options["cache"] = cache
        return element_dropout.call(self.dropout1, self.self_attn(x, x, x, need_weights=False, **masks, **options)[0])

    def _mha_block(
        self,
        x: Tensor,
        mem: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool = False,
        *,
        cache: AttentionCache | None = None,
    ) -> Tensor:
        """The attention of x over mem, after dropout, in the shape of x. The parent class has no cache."""
        masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        options: dict[str, Any] = {"is_causal": is_causal}
        if cache is not None and getattr(self.multihead_attn, "takes_cache", False):
            options["cache"] = cache
        out = self.multihead_attn(x, mem, mem, need_weights=False, **masks, **options)[0]
        return element_dropout.call(self.dropout2, out)

    def _ff_block(self, x: Tensor) -> Tensor:
        """The feed-forward block of x, after dropout, in the shape of x."""
        return _feed_forward(self, x, self.dropout3)


DECODER_BLOCKS = native_layer.blocks_of(TransformerDecoderLayer)


class TransformerDecoder(nn.TransformerDecoder):
    """`torch.nn.TransformerDecoder` on the fused kernel, with a cache for decoding step by step.

    Constructor, forward contract and state-dict keys are those of the parent class.

    >>> import torch
    >>> from fused_attn import KVCache, TransformerDecoder, TransformerDecoderLayer
    >>> decoder = TransformerDecoder(TransformerDecoderLayer(64, 4, batch_first=True), num_layers=2).eval()
    >>> tgt, memory = torch.randn(2, 5, 64), torch.randn(2, 10, 64)
    >>> out = decoder(tgt, memory, tgt_is_causal=True)  # all rows at once
    >>> cache = KVCache(num_layers=2)
    >>> with torch.no_grad():
    ...     steps = [decoder(row, memory, cache=cache) for row in tgt.split(1, dim=1)]  # one row after the other
    >>> torch.testing.assert_close(torch.cat(steps, dim=1), out.detach())

    Args:
        decoder_layer: copied num_layers times. One of torch's own layers is accepted, too: `convert_attention`
            converts its attention.
        num_layers: the number of layers.
        norm: applied to the output of the last layer.
        backend: see `fused_attention`. None leaves the backend of decoder_layer as it is.

    Raises:
        TypeError: num_layers is no int, or a layer or norm is no module.
        ValueError: num_layers is negative, or there is no backend of this name.
    """

    def __init__(
        self,
        decoder_layer: nn.TransformerDecoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        *,
        backend: str | None = None,
    ):
        _check_stack("decoder_layer", decoder_layer, num_layers, norm)
        super().__init__(decoder_layer, num_layers, norm)
        _fuse(self.layers, backend)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The output of the last layer, laid out as tgt: (T, N, E), or (N, T, E) with batch_first, or (T, E).

        The arguments are those of `TransformerDecoderLayer`, except for these:

        Args:
            tgt_is_causal: a hint that tgt_mask is the causal mask. None means: compare the contents of the mask.
                Without a tgt_mask, tgt_is_causal=True means the causal mask itself.
            cache: a `KVCache` with one entry for each layer. One cache serves one memory.

        Raises:
            AssertionError, RuntimeError: tgt, memory or a mask does not fit, see `FusedMultiheadAttention`.
            TypeError: the cache is no `KVCache`.
            ValueError: the cache has another number of layers, a layer takes no cache, or the cache was filled with
                another memory.
        """
        if has_torch_function_variadic(tgt, memory):
            masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
            options = {} if cache is None else {"cache": cache}
            node = call_node(self, tgt, memory, *masks, tgt_is_causal, memory_is_causal, **options)
            if node is not None:
                return node
        checks.check_tensor("tgt", tgt)
        checks.check_tensor("memory", memory)
        _check_decoder_masks(tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, memory_is_causal)
        _check_compared("tgt_mask", tgt_mask)
        _check_hint("tgt_is_causal", tgt_is_causal)
        seqlen = _seqlen(tgt, self.layers)
        if cache is None and not all(getattr(layer, "takes_is_causal", False) for layer in self.layers):
            tgt_mask = _dense_mask(tgt_mask, tgt_is_causal, seqlen, tgt.device)
            return super().forward(
                tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
                tgt_is_causal, memory_is_causal,
            )  # fmt: skip
        if cache is None:
            caches: list[Any] = [{}] * len(self.layers)
        else:
            self._check_cache(cache)
            caches = [{"cache": layer_cache} for layer_cache in cache.layers]
            first: Any = self.layers[0]
            if type(first) is not TransformerDecoderLayer:  # which may pass another tensor to its attention
                check_memory(first, tgt, memory, memory_mask, memory_key_padding_mask, memory_is_causal, None)
        tgt_mask, tgt_is_causal = _causal_mask(tgt_mask, tgt_is_causal, tgt_key_padding_mask, seqlen)
        with contextlib.nullcontext() if cache is None else restoring_layers(cache.layers):
            for layer, layer_cache in zip(self.layers, caches, strict=True):
                tgt = layer(
                    tgt,
                    memory,
                    tgt_mask=tgt_mask,
                    memory_mask=memory_mask,
                    tgt_key_padding_mask=tgt_key_padding_mask,
                    memory_key_padding_mask=memory_key_padding_mask,
                    tgt_is_causal=tgt_is_causal,
                    memory_is_causal=memory_is_causal,
                    **layer_cache,
                )
            return tgt if self.norm is None else self.norm(tgt)

    def _check_cache(self, cache: Any) -> None:
        """Raises TypeError or ValueError unless the layers take this cache."""
        if not hasattr(cache, "layers"):
            raise TypeError(f"cache: expected a KVCache, got {type(cache).__name__}{paged_hint(cache)}")
        if len(cache.layers) != len(self.layers):
            raise ValueError(f"cache: expected one for {len(self.layers)} layers, got one for {len(cache.layers)}")
        if not self.takes_cache:
            raise ValueError("cache: expected None, since a layer or its self-attention takes no cache, got one")

    def recorded_step(
        self, tgt: Tensor, memory: Tensor, memory_key_padding_mask: Tensor | None, cache: KVCache
    ) -> Callable[[Tensor], Tensor] | None:
        """A function that computes ``self(tgt, memory, ...)`` for one new row of each target, with less work in Python.

        The function may be called as long as nobody replaces a module or a parameter of the decoder, adds a hook or
        calls ``train()``. The values of parameters may change. The tensor that it returns may be overwritten by its
        next call, so two threads must not share one function.

        The function calls `forward` where that computes something else: with gradients, under autocast and under modes
        of torch, and for a row of another shape or dtype. It also does so, and warns once, if the cache has got other
        buffers, as by ``reorder`` with the cross-attention, ``reserve`` and ``to``. Then record another step.

        The arguments are those of `forward`. At least one step with this memory and this cache has been done.

        Raises:
            TypeError, ValueError: the cache is none for this decoder, as in `forward`.

        Returns:
            None if only `forward` can compute the step: on a GPU, with gradients, with hooks, and with modules of other
            classes.
        """
        if type(self) is not TransformerDecoder or not few_rows.is_called_plainly(self):
            return None
        padding = memory_key_padding_mask
        self._check_cache(cache)
        step = native_layer.record(self.layers, DECODER_BLOCKS, self.norm, tgt, memory, padding, cache)
        if step is None:
            return None
        has_warned = False

        def run(tgt: Tensor) -> Tensor:
            nonlocal has_warned
            if step.can_run(tgt):
                return step.run(tgt)
            if not (has_warned or step.has_its_buffers()):
                has_warned = True
                warnings.warn(
                    "a recorded step calls forward, because the cache has got other buffers; record the step again",
                    stacklevel=2,
                )
            return self(tgt, memory, memory_key_padding_mask=padding, cache=cache)

        return run

    #: Whether tgt_is_causal=True without a mask is the causal mask. This holds for layers of any class.
    takes_is_causal = True

    @property
    def takes_cache(self) -> bool:
        """Whether a cache may be passed. Every layer must take its part of the cache."""
        return all(getattr(layer, "takes_cache", False) for layer in self.layers)


few_rows.FORWARDS[TransformerDecoder] = TransformerDecoder.forward


class Transformer(nn.Transformer):
    """`torch.nn.Transformer` on the fused kernel.

    Constructor, forward contract and state-dict keys are those of the parent class. A custom encoder or decoder is used
    as it is.

    >>> import torch
    >>> from fused_attn import Transformer
    >>> model = Transformer(64, 4, num_encoder_layers=1, num_decoder_layers=1, batch_first=True)
    >>> causal = torch.nn.Transformer.generate_square_subsequent_mask(5)
    >>> model(torch.randn(2, 10, 64), torch.randn(2, 5, 64), tgt_mask=causal).shape
    torch.Size([2, 5, 64])

    Args:
        d_model: E. This argument and the next ones are those of the parent class.
        backend: see `fused_attention`.

    Raises:
        TypeError: a size is no int, a flag is no bool, or activation is neither a name nor a callable.
        ValueError: an argument has a value that does not fit.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: nn.Module | None = None,
        custom_decoder: nn.Module | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        backend: str | None = None,
    ):
        check_sizes(0, num_encoder_layers=num_encoder_layers, num_decoder_layers=num_decoder_layers)
        checks.check_flags(batch_first=batch_first, norm_first=norm_first, bias=bias)
        for name, module in (("custom_encoder", custom_encoder), ("custom_decoder", custom_decoder)):
            _check_module(name, module)

        def stack(stack_class: type, layer_class: type, num_layers: int) -> nn.Module:
            """An encoder or a decoder with num_layers new layers and a final norm."""
            layer = layer_class(
                d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
                device, dtype, backend=backend,
            )  # fmt: skip
            norm = nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, device=device, dtype=dtype)
            return stack_class(layer, num_layers, norm)

        # The order is that of the parent class, so the same seed gives the same weights.
        if custom_encoder is None:
            custom_encoder = stack(TransformerEncoder, TransformerEncoderLayer, num_encoder_layers)
        if custom_decoder is None:
            custom_decoder = stack(TransformerDecoder, TransformerDecoderLayer, num_decoder_layers)
        super().__init__(
            d_model, nhead, custom_encoder=custom_encoder, custom_decoder=custom_decoder, batch_first=batch_first
        )

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The decoder's output (T, N, E), or (N, T, E) with batch_first, or (T, E).

        Args:
            src: input of the encoder, (S, N, E), or (N, S, E) with batch_first, or (S, E).
            tgt: input of the decoder, (T, N, E), or (N, T, E) with batch_first, or (T, E).

        The other arguments are those of `TransformerEncoder` and `TransformerDecoder`.

        Raises:
            AssertionError: an input or a mask does not fit, see `FusedMultiheadAttention`.
            RuntimeError: src and tgt have different batch sizes, or a hint such as tgt_is_causal=True comes without its
                mask.
        """
        if has_torch_function_variadic(src, tgt):
            masks = (src_mask, tgt_mask, memory_mask, src_key_padding_mask, tgt_key_padding_mask)
            hints = (memory_key_padding_mask, src_is_causal, tgt_is_causal, memory_is_causal)
            node = call_node(self, src, tgt, *masks, *hints)
            if node is not None:
                return node
        checks.check_tensor("tgt", tgt)
        _check_decoder_masks(tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, memory_is_causal)
        checks.check_tensor("src", src)
        checks.check_tensors(src_mask=src_mask, src_key_padding_mask=src_key_padding_mask)
        _check_compared("src_mask", src_mask)
        _check_compared("tgt_mask", tgt_mask)
        _check_hint("src_is_causal", src_is_causal)
        _check_hint("tgt_is_causal", tgt_is_causal)
        batch_dim = 0 if self.batch_first else 1
        if src.dim() == tgt.dim() == 3 and src.shape[batch_dim] != tgt.shape[batch_dim]:
            raise RuntimeError(
                f"tgt: expected the batch size of src, {src.shape[batch_dim]}, got {tgt.shape[batch_dim]}; "
                + batch_layout(self.batch_first)
            )
        for name, mask, hint in (
            ("src_mask", src_mask, src_is_causal),
            ("tgt_mask", tgt_mask, tgt_is_causal),
            ("memory_mask", memory_mask, memory_is_causal),
        ):
            if hint and mask is None:
                raise RuntimeError(f"{name}: expected the causal mask of which is_causal=True is a hint, got None")
        return super().forward(
            src, tgt, src_mask, tgt_mask, memory_mask, src_key_padding_mask, tgt_key_padding_mask,
            memory_key_padding_mask, src_is_causal, tgt_is_causal, memory_is_causal,
        )  # fmt: skip


def _residual(layer: Any, x: Tensor, norm: nn.Module, block: Callable[[Tensor], Tensor]) -> Tensor:
    """The output of a block of a layer, with its residual connection and its layer norm."""
    return x + block(norm(x)) if layer.norm_first else norm(x + block(x))


def _feed_forward(layer: Any, x: Tensor, last_dropout: nn.Module) -> Tensor:
    """The feed-forward block of a layer, after dropout, in the shape of x."""
    hidden = few_rows.call(layer.linear1, x)
    # Without gradients, nobody else sees the output of a plain linear layer, so it may be overwritten.
    is_own = modes.is_direct() and type(hidden) is Tensor and few_rows.is_plain(layer.linear1)
    if layer.activation is not F.relu:
        hidden = element_dropout.call(layer.dropout, layer.activation(hidden))
    elif is_own and not hidden.requires_grad:
        hidden = element_dropout.call(layer.dropout, torch.relu_(hidden))
    elif few_rows.is_plain(layer.linear2):
        hidden = element_dropout.call_after_relu(layer.dropout, hidden)
    else:  # the module may overwrite its input, which `call_after_relu` keeps for backward
        hidden = element_dropout.call(layer.dropout, F.relu(hidden))
    return element_dropout.call(last_dropout, few_rows.call(layer.linear2, hidden))


def check_layer(
    d_model: int,
    nhead: int,
    dim_feedforward: int,
    dropout: float,
    activation: str | Callable[[Tensor], Tensor],
    layer_norm_eps: float = 1e-5,
) -> None:
    """Raises TypeError or ValueError if no layer can have these arguments."""
    check_sizes(1, d_model=d_model, nhead=nhead)
    check_sizes(0, dim_feedforward=dim_feedforward)
    check_divides("nhead", nhead, "d_model", d_model)
    checks.check_probability("dropout", dropout)
    if not isinstance(activation, str) and not callable(activation):
        raise checks.wrong_type("activation", "a name or a callable", activation)
    checks.check_number("layer_norm_eps", layer_norm_eps)
    if not layer_norm_eps >= 0.0:
        raise checks.fail("layer_norm_eps", "a number >= 0", layer_norm_eps)


def _check_stack(name: str, layer: nn.Module, num_layers: int, norm: nn.Module | None) -> None:
    """Raises TypeError or ValueError if no stack can have these arguments. name: the argument `layer`"""
    if not isinstance(layer, nn.Module):
        raise checks.wrong_type(name, "a torch.nn.Module", layer)
    check_sizes(0, num_layers=num_layers)
    _check_module("norm", norm)


def _check_module(name: str, module: nn.Module | None) -> None:
    """Raises TypeError unless module is a module or None."""
    if module is not None and not isinstance(module, nn.Module):
        raise checks.wrong_type(name, "None or a torch.nn.Module", module)


def _check_hint(name: str, is_causal: bool | None) -> None:
    """Raises TypeError unless the hint is None or a bool."""
    if is_causal is not None:
        checks.check_flag(name, is_causal)


def _check_compared(name: str, mask: Tensor | None) -> None:
    """Raises AssertionError if a mask is neither bool nor floating point.

    Attention would raise this error, too, but only after a stack has compared the mask with the causal mask.
    """
    if mask is not None and causal_bias(mask) is None:
        check_mask_dtype(name, mask)


def _check_decoder_masks(
    tgt_mask: Tensor | None,
    memory_mask: Tensor | None,
    tgt_key_padding_mask: Tensor | None,
    memory_key_padding_mask: Tensor | None,
    memory_is_causal: bool,
) -> None:
    """Raises TypeError if a mask of a decoder is no tensor, or its hint no bool.

    Attention would raise such an error, too, but it would speak of its own arguments.
    """
    checks.check_tensors(
        tgt_mask=tgt_mask, memory_mask=memory_mask, tgt_key_padding_mask=tgt_key_padding_mask,
        memory_key_padding_mask=memory_key_padding_mask,
    )  # fmt: skip
    checks.check_flag("memory_is_causal", memory_is_causal)


def check_memory(
    layer: Any,
    tgt: Tensor,
    memory: Tensor,
    mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    cache: CrossAttentionCache | None,
) -> None:
    """Raises the errors that cross-attention would raise, before self-attention adds its rows to the cache.

    `Restoring` takes these rows out again after an error, but not in compiled code.

    layer: a decoder layer
    mask, key_padding_mask, is_causal: those of the memory
    cache: that of the cross-attention of the layer. None means that it is not looked at
    """
    sizes, tgt_sizes = memory.shape, tgt.shape
    if len(sizes) != len(tgt_sizes):
        raise AssertionError(f"memory: expected {len(tgt_sizes)} dimensions, as tgt has, got {tuple(sizes)}")
    batch, length, rows = 1, sizes[0], tgt_sizes[0]
    if len(sizes) == 3:
        batch_dim = 0 if layer.self_attn.batch_first else 1
        batch, length, rows = sizes[batch_dim], sizes[1 - batch_dim], tgt_sizes[1 - batch_dim]
        if batch != tgt_sizes[batch_dim]:
            raise RuntimeError(
                f"memory: expected the batch size of tgt, {tgt_sizes[batch_dim]}, got {batch}; "
                + batch_layout(batch_dim == 0)
            )
    if key_padding_mask is not None:
        check_mask_dtype("memory_key_padding_mask", key_padding_mask)
        expected = (batch, length) if len(sizes) == 3 else (length,)
        if key_padding_mask.shape != expected:
            raise AssertionError(
                f"memory_key_padding_mask: expected shape {expected}, got {tuple(key_padding_mask.shape)}"
            )
    attention = layer._modules.get("multihead_attn")  # looking up an attribute of a module takes three times as long
    if isinstance(attention, FusedMultiheadAttention):
        if sizes[-1] != attention.kdim:
            raise RuntimeError(f"memory: expected {attention.kdim} features, got shape {tuple(sizes)}")
        if mask is not None and causal_bias(mask) is None:
            check_mask_dtype("memory_mask", mask)
            is_read = key_padding_mask is not None or not is_causal
            shapes = (rows, length), (batch * attention.num_heads, rows, length)
            if is_read and mask.shape not in shapes:
                raise RuntimeError(f"memory_mask: expected shape {shapes[0]} or {shapes[1]}, got {tuple(mask.shape)}")
    if cache is not None:
        cache.get(memory)


def _fuse(layers: nn.ModuleList, backend: str | None) -> None:
    """Puts the layers of a stack on the fused kernel, in place. None leaves the backends as they are."""
    check_backend(backend)
    replace_attention(layers, backend)
    convert_layers(layers)
    if backend is not None:
        for module in layers.modules():
            if isinstance(module, FusedMultiheadAttention):
                module.backend = backend


def convert_layers(model: nn.Module) -> None:
    """Turns torch's layers and stacks that contain fused attention into the classes of this module, in place.

    `fused_attn.convert_attention` calls this function after it has replaced the attention.
    """
    # The layers come before the stacks, because the class of a stack depends on its layers.
    for module in model.modules():
        if type(module) is nn.TransformerEncoderLayer and _is_fused(module.self_attn):
            module.__class__ = TransformerEncoderLayer
        elif isinstance(module, nn.TransformerEncoderLayer):
            keep_fast_path_off(module, "self_attn", module.self_attn)
        elif type(module) is nn.TransformerDecoderLayer and _is_fused(module.self_attn, module.multihead_attn):
            module.__class__ = TransformerDecoderLayer
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(map(_has_fused_attention, module.layers)):
            # torch decided at construction, from the attention of that time, whether to use nested tensors.
            module.use_nested_tensor = False
            if type(module) is nn.TransformerEncoder:
                module.__class__ = TransformerEncoder
        elif type(module) is nn.TransformerDecoder and any(map(_has_fused_attention, module.layers)):
            module.__class__ = TransformerDecoder


def _is_fused(*attention: nn.Module) -> bool:
    """Whether all of these modules are `FusedMultiheadAttention`."""
    return all(isinstance(module, FusedMultiheadAttention) for module in attention)


def _has_fused_attention(layer: nn.Module) -> bool:
    """Whether a layer contains a `FusedMultiheadAttention`."""
    return any(isinstance(module, FusedMultiheadAttention) for module in layer.modules())


def _seqlen(x: Tensor, layers: nn.ModuleList) -> int:
    """The length L of x, which is (N, L, E), (L, N, E) or (L, E). The batch_first of the first layer decides."""
    first: Any = layers[0]
    return x.shape[1 if x.dim() == 3 and first.self_attn.batch_first else 0]


def _causal_mask(
    mask: Tensor | None, is_causal: bool | None, key_padding_mask: Tensor | None, seqlen: int
) -> tuple[Tensor | None, bool]:
    """(mask, is_causal) for the layers of a stack. If the mask is causal, the layers get the flag in its place.

    - Without padding, the layers believe a hint and do not read the mask.
    - With padding, every layer would read the mask. So the mask is compared with the causal mask once, here.
    - The comparison waits for a GPU. `torch.nn.Transformer` waits, too, whenever it gets no hint.
    - is_causal=True without a mask needs no comparison. Neither does a mask that is
      ``torch.nn.attention.bias.causal_upper_left(L, L)``.
    """
    if mask is None:
        return None, bool(is_causal)
    bias = causal_bias(mask)
    if bias is not None:
        # A causal bias holds no data, so the flag replaces the bias. If the sizes do not fit, attention raises.
        return (None, True) if bias[:3] == (seqlen, seqlen, 0) else (mask, bool(is_causal))
    if is_causal is not None and key_padding_mask is None:
        return mask, is_causal
    if is_causal is False or not _can_look_at(mask) or not _is_causal(mask, seqlen):
        return mask, bool(is_causal)
    return (mask if key_padding_mask is None else None), True


def _dense_mask(mask: Tensor | None, is_causal: bool | None, seqlen: int, device: torch.device) -> Tensor | None:
    """The mask for layers of other classes, which read a mask and not the flag is_causal.

    A causal bias, or is_causal=True without a mask, becomes a bool mask (L, S), in which True hides the key.
    """
    bias = None if mask is None else causal_bias(mask)
    if bias is None and not (mask is None and is_causal):
        return mask
    rows, columns, offset = (seqlen, seqlen, 0) if bias is None else bias[:3]
    return torch.ones(rows, columns, dtype=torch.bool, device=device).triu(offset + 1)


def _can_look_at(mask: Tensor) -> bool:
    """Whether the contents of the mask may be compared.

    A traced graph and a captured one cannot read values. A mask that requires grad must be used itself.
    """
    if torch.compiler.is_compiling() or mask.requires_grad:
        return False
    return not (mask.is_cuda and torch.cuda.is_current_stream_capturing())


def _is_causal(mask: Tensor, seqlen: int) -> bool:
    """Whether the mask is (L, L) and hides the scores above the diagonal and no others, as True or as -inf."""
    if mask.shape != (seqlen, seqlen):
        return False
    hidden = torch.ones(mask.shape, dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype == torch.bool:
        return torch.equal(mask, hidden)
    return torch.equal(mask, torch.zeros_like(mask).masked_fill(hidden, float("-inf")))
