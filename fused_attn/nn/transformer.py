"""`torch.nn.Transformer` and its parts on `FusedMultiheadAttention`.

These are thin subclasses. Parameters, feed-forward blocks and initialisation are those of the parents. Three things
differ:

- Attention always runs on the fused kernel. There is no inference fast path, so no nested tensors are made.
- Bool masks stay bool, so that the kernel can skip padding. Ranges of keys take the place of a mask (L, S).
- Encoders and decoders take a cache.

A stack passes plain tensors to its layers, because hooks, checkpoints and mixed precision handle tensors. If the
contents of a mask turn out to be causal, the stack may pass None and is_causal=True in its place. Three attributes of a
layer say what the stack may pass:

- ``takes_is_causal``: is_causal=True without a mask. All layers of the stack must have this attribute set. Otherwise
  they all get what torch's own stacks pass. A layer whose methods a subclass replaces has the attribute False, because
  these methods may ignore the flag, as they may in torch. A class whose methods read the flag can have it
  as an attribute that is True.
- ``takes_cache``: a cache.
- ``takes_key_ranges``: ranges of keys.

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
from fused_attn.nn import element_dropout, native_layer, native_linear
from fused_attn.nn.arguments import accepts, batch_layout, check_backend, check_sizes, given, runs_methods_of
from fused_attn.nn.attention import AttentionCache, FusedMultiheadAttention, keep_fast_path_off
from fused_attn.nn.layer_checks import (
    check_compared,
    check_decoder_masks,
    check_hint,
    check_layer,
    check_layer_cache,
    check_memory,
    check_module,
    check_ranges,
    check_stack,
    check_takes_ranges,
    takes_ranges,
)
from fused_attn.nn.paged_self_attention import paged_hint
from fused_attn.nn.plain import FORWARDS, is_called_plainly, is_plain_linear
from fused_attn.nn.replacement import replace_attention
from fused_attn.nn.restoring import restoring_layers
from fused_attn.nn.stack_masks import dense_mask, mask_and_flag
from fused_attn.nn.tracing import call_node

if TYPE_CHECKING:
    from fused_attn.nn.cache import KVCache, LayerCache


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
        *,
        src_key_ranges: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """The layer's output, laid out as src: (S, N, E), or (N, S, E) with batch_first, or (S, E).

        Args:
            src: the sequences. With a cache: only their new rows.
            src_mask: (S, S) or (N * nhead, S, S). Bool: True = may NOT attend. Floating point: added to the scores.
            src_key_padding_mask: (N, S) or (S,). Bool: True = ignore the key. Floating point: added to the scores.
                With a cache, the mask covers all rows so far; with a `StaticKVCache`, its max_length rows.
            is_causal: a hint that src_mask is the causal mask, see `FusedMultiheadAttention`. Without a src_mask,
                is_causal=True means the causal mask itself.
            src_key_ranges: (S, R, 2), (N, S, R, 2) or (N, nhead, S, R, 2) int32, the R ranges of keys that a query
                sees, see `fused_attention`. The batch comes first whether batch_first is True or False. None with a
                cache.
            cache: the part of a `KVCache` that belongs to this layer, ``cache.layers[i]``. Self-attention is then
                causal without a src_mask.

        Raises:
            AssertionError, RuntimeError: src or a mask does not fit, see `FusedMultiheadAttention`.
            TypeError, ValueError: src_key_ranges or the cache does not fit.
        """
        if has_torch_function_variadic(src):
            options = given(src_key_ranges=src_key_ranges, cache=cache)
            node = call_node(self, src, src_mask, src_key_padding_mask, is_causal, **options)
            if node is not None:
                return node
        checks.check_tensor("src", src)
        checks.check_tensors(
            src_mask=src_mask, src_key_padding_mask=src_key_padding_mask, src_key_ranges=src_key_ranges
        )
        checks.check_flag("is_causal", is_causal)
        check_layer_cache(cache)
        masks, options = (src_mask, src_key_padding_mask, is_causal), given(key_ranges=src_key_ranges)
        if src_key_ranges is not None:
            check_ranges("src_key_ranges", src_key_ranges, src, self._sa_block, self.self_attn)
            if cache is not None:
                raise checks.fail("src_key_ranges", "None with a cache", "a tensor")
        if cache is not None:
            options["cache"] = cache.self_attention
        with contextlib.nullcontext() if cache is None else restoring_layers([cache]):
            is_native = native_layer.is_plain(self, ENCODER_BLOCKS)
            step = None
            if is_native and src_key_ranges is None:
                step = native_layer.self_attention(self, src, masks, options.get("cache"))
            x = step.run() if step else _residual(self, src, self.norm1, lambda y: self._sa_block(y, *masks, **options))
            step = native_layer.feed_forward(self, x) if is_native else None
            return step.run() if step else _residual(self, x, self.norm2, self._ff_block)

    def _sa_block(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool = False,
        *,
        key_ranges: Tensor | None = None,
        cache: AttentionCache | None = None,
    ) -> Tensor:
        """The self-attention of x, after dropout, in the shape of x. The parent class has no ranges, no cache."""
        return _self_attention(self, x, is_causal, attn_mask, key_padding_mask, key_ranges, cache)

    def _ff_block(self, x: Tensor) -> Tensor:
        """The feed-forward block of x, after dropout, in the shape of x."""
        return _feed_forward(self, x, self.dropout2)

    @property
    def takes_is_causal(self) -> bool:
        """Whether is_causal=True without a mask is the causal mask. Methods of a subclass may not read the flag."""
        is_own = runs_methods_of(TransformerEncoderLayer, self, "forward", "_sa_block")
        return is_own and getattr(self.self_attn, "takes_is_causal", False)

    @property
    def takes_key_ranges(self) -> bool:
        """Whether src_key_ranges may be passed. The class of the self-attention decides this."""
        return accepts(self.forward, "src_key_ranges") and takes_ranges(self._sa_block, self.self_attn)

    @property
    def takes_cache(self) -> bool:
        """Whether a cache may be passed. The class of the self-attention decides this."""
        return _takes_cache(self)


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
        TypeError: num_layers is no int, norm is no module, or the layer is no module that can be a layer of this stack.
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
        padding = "src_key_padding_mask" if type(self).forward is TransformerEncoder.forward else None
        check_stack("encoder_layer", encoder_layer, padding, num_layers, norm)
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
        *,
        src_key_ranges: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The output of the last layer, laid out as src: (S, N, E), or (N, S, E) with batch_first, or (S, E).

        Args:
            src: the sequences. With a cache: only their new rows.
            mask: (S, S) or (N * nhead, S, S). Bool: True = may NOT attend. Floating point: added to the scores.
            src_key_padding_mask: (N, S) or (S,). Bool: True = ignore the key. Floating point: added to the scores.
                With a cache, the mask covers all rows so far; with a `StaticKVCache`, its max_length rows.
            is_causal: a hint that mask is the causal mask. None means: compare the contents of the mask. Without a
                mask, is_causal=True means the causal mask itself.
            src_key_ranges: (S, R, 2), (N, S, R, 2) or (N, nhead, S, R, 2) int32, see `TransformerEncoderLayer`.
            cache: keys and values of the rows so far. The layers are then causal without a mask: a model that sees no
                memory, such as GPT, decodes step by step.

        Raises:
            AssertionError: src is a nested tensor with layout=torch.strided, or src or a mask does not fit.
            RuntimeError: src or a mask does not fit, see `FusedMultiheadAttention`.
            TypeError, ValueError: src_key_ranges or the cache does not fit, or a layer takes none.
        """
        if has_torch_function_variadic(src):
            options = given(src_key_ranges=src_key_ranges, cache=cache)
            node = call_node(self, src, mask, src_key_padding_mask, is_causal, **options)
            if node is not None:
                return node
        checks.check_tensor("src", src)
        checks.check_tensors(mask=mask, src_key_padding_mask=src_key_padding_mask)
        check_compared("mask", mask)
        check_hint("is_causal", is_causal)
        if src.is_nested and src.layout is torch.strided:
            expected = "a padded tensor with a src_key_padding_mask, or a nested tensor with layout=torch.jagged"
            raise AssertionError(f"src: expected {expected}, got one with layout=torch.strided")
        ranges = given(src_key_ranges=src_key_ranges)
        check_takes_ranges(self, **ranges)
        seqlen = _seqlen(src, self.layers)
        caches = _caches_of_layers(self, cache)
        # With a cache, self-attention is causal by itself.
        if cache is not None or all(getattr(layer, "takes_is_causal", False) for layer in self.layers):
            mask, is_causal = mask_and_flag(mask, is_causal, src_key_padding_mask, seqlen)
        else:
            # Other layers get the masks in the form that the parent class passes.
            mask = dense_mask(mask, is_causal, seqlen, src)
            if not ranges:
                return super().forward(src, mask, src_key_padding_mask, is_causal)
            is_causal = bool(is_causal)
        masks: dict[str, Any] = {"src_mask": mask, "src_key_padding_mask": src_key_padding_mask}
        with contextlib.nullcontext() if cache is None else restoring_layers(cache.layers):
            for layer, layer_cache in zip(self.layers, caches, strict=True):
                src = layer(src, **masks, is_causal=is_causal, **ranges, **layer_cache)
            return src if self.norm is None else self.norm(src)

    @property
    def takes_is_causal(self) -> bool:
        """Whether is_causal=True without a mask is the causal mask. This holds for layers of any class."""
        return runs_methods_of(TransformerEncoder, self, "forward")

    @property
    def takes_cache(self) -> bool:
        """Whether a cache may be passed. Every layer must take its part of the cache."""
        return accepts(self.forward, "cache") and all(getattr(layer, "takes_cache", False) for layer in self.layers)


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
        tgt_key_ranges: Tensor | None = None,
        memory_key_ranges: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """The layer's output, laid out as tgt: (T, N, E), or (N, T, E) with batch_first, or (T, E).

        Args:
            tgt: the target sequences. With a cache: only their new rows.
            memory: the encoder's output, (S, N, E), or (N, S, E) with batch_first, or (S, E).
            tgt_mask: (T, T) or (N * nhead, T, T). Bool: True = may NOT attend. Floating point: added to the scores.
            memory_mask: (T, S) or (N * nhead, T, S), with the same meaning as tgt_mask.
            tgt_key_padding_mask: (N, T) or (T,). Bool: True = ignore the key. Floating point: added to the scores.
                With a cache, the mask covers all rows so far; with a `StaticKVCache`, its max_length rows.
            memory_key_padding_mask: (N, S) or (S,), with the same meaning as tgt_key_padding_mask.
            tgt_is_causal: a hint that tgt_mask is the causal mask, see `FusedMultiheadAttention`. Without a tgt_mask,
                tgt_is_causal=True means the causal mask itself.
            memory_is_causal: the same hint for memory_mask.
            tgt_key_ranges: (T, R, 2), (N, T, R, 2) or (N, nhead, T, R, 2) int32, the R ranges of targets that a target
                sees, see `fused_attention`. The batch comes first whether batch_first is True or False. None with a
                cache.
            memory_key_ranges: of the same shapes, the ranges of rows of the memory that a target sees.
            cache: the part of a `KVCache` that belongs to this layer, ``cache.layers[i]``. Self-attention is then
                causal without a tgt_mask. Keys and values of the memory are computed in the first step alone, unless
                ``multihead_attn`` is of a class that takes no cache.

        Raises:
            AssertionError, RuntimeError: tgt, memory or a mask does not fit, see `FusedMultiheadAttention`.
            TypeError: `cache` is not the cache of a layer, or ranges are no int32 tensor.
            ValueError: the cache or the ranges do not fit the call.
        """
        if has_torch_function_variadic(tgt, memory):
            masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
            options = given(tgt_key_ranges=tgt_key_ranges, memory_key_ranges=memory_key_ranges, cache=cache)
            node = call_node(self, tgt, memory, *masks, tgt_is_causal, memory_is_causal, **options)
            if node is not None:
                return node
        checks.check_tensor("tgt", tgt)
        checks.check_tensor("memory", memory)
        check_decoder_masks(tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, memory_is_causal)
        checks.check_tensors(tgt_key_ranges=tgt_key_ranges, memory_key_ranges=memory_key_ranges)
        checks.check_flag("tgt_is_causal", tgt_is_causal)
        check_layer_cache(cache)
        if type(self) is TransformerDecoderLayer and (cache is not None or _takes_memory(self, tgt, memory)):
            cross_cache = None if cache is None else cache.cross_attention
            check_memory(self, tgt, memory, memory_mask, memory_key_padding_mask, memory_is_causal, cross_cache)
        # A subclass may override _mha_block with torch's signature, which has no cache. So the cache is passed only if
        # the method accepts it.
        own, cross = given(key_ranges=tgt_key_ranges), given(key_ranges=memory_key_ranges)
        if tgt_key_ranges is not None:
            check_ranges("tgt_key_ranges", tgt_key_ranges, tgt, self._sa_block, self.self_attn)
            if cache is not None:
                raise checks.fail("tgt_key_ranges", "None with a cache", "a tensor")
        if memory_key_ranges is not None:
            check_ranges("memory_key_ranges", memory_key_ranges, tgt, self._mha_block, self.multihead_attn)
        if cache is not None:
            own["cache"] = cache.self_attention
            if accepts(self._mha_block, "cache"):
                cross["cache"] = cache.cross_attention
        own_masks = tgt_mask, tgt_key_padding_mask, tgt_is_causal
        cross_masks = memory_mask, memory_key_padding_mask, memory_is_causal
        with contextlib.nullcontext() if cache is None else restoring_layers([cache]):
            is_native = native_layer.is_plain(self, DECODER_BLOCKS)
            step = None
            if is_native and tgt_key_ranges is None:
                step = native_layer.self_attention(self, tgt, own_masks, own.get("cache"))
            x = step.run() if step else _residual(self, tgt, self.norm1, lambda y: self._sa_block(y, *own_masks, **own))
            step = None
            if is_native and memory_key_ranges is None:
                step = native_layer.cross_attention(self, x, memory, cross_masks, cross.get("cache"))
            if step:
                y = step.run()
            else:
                y = _residual(self, x, self.norm2, lambda z: self._mha_block(z, memory, *cross_masks, **cross))
            step = native_layer.feed_forward(self, y) if is_native else None
            return step.run() if step else _residual(self, y, self.norm3, self._ff_block)

    @property
    def takes_is_causal(self) -> bool:
        """Whether tgt_is_causal=True without a mask is the causal mask. Methods of a subclass may not read the flag."""
        is_own = runs_methods_of(TransformerDecoderLayer, self, "forward", "_sa_block")
        return is_own and getattr(self.self_attn, "takes_is_causal", False)

    @property
    def takes_cache(self) -> bool:
        """Whether a cache may be passed. The class of the self-attention decides this."""
        return _takes_cache(self)

    @property
    def takes_key_ranges(self) -> bool:
        """Whether ranges of keys may be passed. The classes of the attention modules decide this."""
        blocks = (self._sa_block, self.self_attn), (self._mha_block, self.multihead_attn)
        return accepts(self.forward, "tgt_key_ranges") and all(takes_ranges(*block) for block in blocks)

    def _sa_block(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool = False,
        *,
        key_ranges: Tensor | None = None,
        cache: AttentionCache | None = None,
    ) -> Tensor:
        """The self-attention of x, after dropout, in the shape of x. The parent class has no ranges, no cache."""
        return _self_attention(self, x, is_causal, attn_mask, key_padding_mask, key_ranges, cache)

    def _mha_block(
        self,
        x: Tensor,
        mem: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool = False,
        *,
        key_ranges: Tensor | None = None,
        cache: AttentionCache | None = None,
    ) -> Tensor:
        """The attention of x over mem, after dropout, in the shape of x. The parent class has no ranges, no cache."""
        masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask, **given(key_ranges=key_ranges)}
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
        TypeError: num_layers is no int, norm is no module, or the layer is no module that can be a layer of this stack.
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
        padding = "memory_key_padding_mask" if type(self).forward is TransformerDecoder.forward else None
        check_stack("decoder_layer", decoder_layer, padding, num_layers, norm)
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
        tgt_key_ranges: Tensor | None = None,
        memory_key_ranges: Tensor | None = None,
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
            TypeError: the cache is no `KVCache`, or ranges are no int32 tensor.
            ValueError: the cache has another number of layers, the cache was filled with another memory, the ranges do
                not fit, or a layer takes no cache or no ranges.
        """
        if has_torch_function_variadic(tgt, memory):
            masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
            options = given(tgt_key_ranges=tgt_key_ranges, memory_key_ranges=memory_key_ranges, cache=cache)
            node = call_node(self, tgt, memory, *masks, tgt_is_causal, memory_is_causal, **options)
            if node is not None:
                return node
        checks.check_tensor("tgt", tgt)
        checks.check_tensor("memory", memory)
        check_decoder_masks(tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, memory_is_causal)
        check_compared("tgt_mask", tgt_mask)
        check_hint("tgt_is_causal", tgt_is_causal)
        ranges = given(tgt_key_ranges=tgt_key_ranges, memory_key_ranges=memory_key_ranges)
        check_takes_ranges(self, **ranges)
        seqlen = _seqlen(tgt, self.layers)
        # With a cache, self-attention is causal by itself.
        if cache is not None or all(getattr(layer, "takes_is_causal", False) for layer in self.layers):
            tgt_mask, tgt_is_causal = mask_and_flag(tgt_mask, tgt_is_causal, tgt_key_padding_mask, seqlen)
        else:
            tgt_mask = dense_mask(tgt_mask, tgt_is_causal, seqlen, tgt)
            if not ranges:
                return super().forward(
                    tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
                    tgt_is_causal, memory_is_causal,
                )  # fmt: skip
            tgt_is_causal = bool(tgt_is_causal)
        caches = _caches_of_layers(self, cache)
        if cache is not None:
            first: Any = self.layers[0]
            if type(first) is not TransformerDecoderLayer:  # which may pass another tensor to its attention
                check_memory(first, tgt, memory, memory_mask, memory_key_padding_mask, memory_is_causal, None)
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
                    **ranges,
                    **layer_cache,
                )
            return tgt if self.norm is None else self.norm(tgt)

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
        if type(self) is not TransformerDecoder or not is_called_plainly(self):
            return None
        padding = memory_key_padding_mask
        _check_cache(self, cache)
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

    @property
    def takes_is_causal(self) -> bool:
        """Whether tgt_is_causal=True without a mask is the causal mask. This holds for layers of any class."""
        return runs_methods_of(TransformerDecoder, self, "forward")

    @property
    def takes_cache(self) -> bool:
        """Whether a cache may be passed. Every layer must take its part of the cache."""
        return all(getattr(layer, "takes_cache", False) for layer in self.layers)


FORWARDS[TransformerDecoder] = TransformerDecoder.forward


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
            check_module(name, module)

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
        *,
        src_key_ranges: Tensor | None = None,
        tgt_key_ranges: Tensor | None = None,
        memory_key_ranges: Tensor | None = None,
    ) -> Tensor:
        """The decoder's output (T, N, E), or (N, T, E) with batch_first, or (T, E).

        Args:
            src: input of the encoder, (S, N, E), or (N, S, E) with batch_first, or (S, E).
            tgt: input of the decoder, (T, N, E), or (N, T, E) with batch_first, or (T, E).

        The other arguments are those of `TransformerEncoder` and `TransformerDecoder`. A hint such as
        tgt_is_causal=True needs its mask, as in the parent class. ``torch.nn.attention.bias.causal_upper_left(T, T)``
        is a causal mask without memory.

        Raises:
            AssertionError: an input or a mask does not fit, see `FusedMultiheadAttention`.
            RuntimeError: src and tgt have different batch sizes, or a hint such as tgt_is_causal=True comes without its
                mask.
            TypeError, ValueError: ranges of keys do not fit, or a layer takes none.
        """
        of_encoder = given(src_key_ranges=src_key_ranges)
        of_decoder = given(tgt_key_ranges=tgt_key_ranges, memory_key_ranges=memory_key_ranges)
        if has_torch_function_variadic(src, tgt):
            masks = (src_mask, tgt_mask, memory_mask, src_key_padding_mask, tgt_key_padding_mask)
            hints = (memory_key_padding_mask, src_is_causal, tgt_is_causal, memory_is_causal)
            node = call_node(self, src, tgt, *masks, *hints, **of_encoder, **of_decoder)
            if node is not None:
                return node
        checks.check_tensor("tgt", tgt)
        check_decoder_masks(tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, memory_is_causal)
        checks.check_tensor("src", src)
        checks.check_tensors(src_mask=src_mask, src_key_padding_mask=src_key_padding_mask)
        check_compared("src_mask", src_mask)
        check_compared("tgt_mask", tgt_mask)
        check_hint("src_is_causal", src_is_causal)
        check_hint("tgt_is_causal", tgt_is_causal)
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
        for name, x in (("src", src), ("tgt", tgt)):
            if x.shape[-1] != self.d_model:
                raise RuntimeError(f"{name}: expected d_model={self.d_model} features, got shape {tuple(x.shape)}")
        check_takes_ranges(self.encoder, **of_encoder)
        check_takes_ranges(self.decoder, **of_decoder)
        memory = self.encoder(
            src, mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=src_is_causal, **of_encoder
        )
        return self.decoder(
            tgt, memory, tgt_mask=tgt_mask, memory_mask=memory_mask, tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask, tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal, **of_decoder,
        )  # fmt: skip


def _self_attention(
    layer: Any,
    x: Tensor,
    is_causal: bool,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    key_ranges: Tensor | None,
    cache: AttentionCache | None,
) -> Tensor:
    """The self-attention of a layer, after dropout, in the shape of x."""
    masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask, "is_causal": is_causal}
    options = given(key_ranges=key_ranges, cache=cache)  # a module with torch's own signature takes neither
    return element_dropout.call(layer.dropout1, layer.self_attn(x, x, x, need_weights=False, **masks, **options)[0])


def _takes_memory(layer: Any, tgt: Tensor, memory: Tensor) -> bool:
    """Whether `check_memory` knows what the layer takes: attention of other classes may take other shapes and masks."""
    is_own = type(layer.self_attn) is type(layer.multihead_attn) is FusedMultiheadAttention
    return is_own and not (tgt.is_nested or memory.is_nested or modes.is_jit_tracing())


def _takes_cache(layer: Any) -> bool:
    """Whether a cache may be passed to a layer. The class of the self-attention decides this."""
    is_accepted = accepts(layer.forward, "cache") and accepts(layer._sa_block, "cache")
    return is_accepted and getattr(layer.self_attn, "takes_cache", False)


def _caches_of_layers(stack: Any, cache: KVCache | None) -> list[dict[str, Any]]:
    """What each layer of a stack gets of the cache, as keyword arguments."""
    if cache is None:
        return [{}] * len(stack.layers)
    _check_cache(stack, cache)
    return [{"cache": layer_cache} for layer_cache in cache.layers]


def _check_cache(stack: Any, cache: Any) -> None:
    """Raises TypeError or ValueError unless the layers of a stack take this cache."""
    if not hasattr(cache, "layers"):
        raise TypeError(f"cache: expected a KVCache, got {type(cache).__name__}{paged_hint(cache)}")
    if len(cache.layers) != len(stack.layers):
        raise checks.fail("cache", f"one for {len(stack.layers)} layers", f"one for {len(cache.layers)}")
    if not stack.takes_cache:
        raise checks.fail("cache", "None, since a layer or its self-attention takes no cache", "one")


def _residual(layer: Any, x: Tensor, norm: nn.Module, block: Callable[[Tensor], Tensor]) -> Tensor:
    """The output of a block of a layer, with its residual connection and its layer norm."""
    if layer.norm_first:
        return x + block(norm(x))
    y = block(x)
    step = native_layer.add_and_normalise(layer, x, y, norm)
    return step.run() if step else norm(x + y)


def _feed_forward(layer: Any, x: Tensor, last_dropout: nn.Module) -> Tensor:
    """The feed-forward block of a layer, after dropout, in the shape of x."""
    hidden = native_linear.call(layer.linear1, x)
    # Without gradients, nobody else sees the output of a plain linear layer, so it may be overwritten.
    is_own = modes.is_direct() and type(hidden) is Tensor and is_plain_linear(layer.linear1)
    if layer.activation is not F.relu:
        hidden = element_dropout.call(layer.dropout, layer.activation(hidden))
    elif is_own and not hidden.requires_grad:
        hidden = element_dropout.call(layer.dropout, torch.relu_(hidden))
    elif is_plain_linear(layer.linear2):
        hidden = element_dropout.call_after_relu(layer.dropout, hidden)
    else:  # the module may overwrite its input, which `call_after_relu` keeps for backward
        hidden = element_dropout.call(layer.dropout, F.relu(hidden))
    return element_dropout.call(last_dropout, native_linear.call(layer.linear2, hidden))


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
