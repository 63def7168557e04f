"""`torch.nn.TransformerDecoder` and its layer on `FusedMultiheadAttention`.

These are thin subclasses, see transformer.py. layer_blocks.py has what they share with the encoder.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import has_torch_function_variadic

from fused_attn import modes
from fused_attn.attention import checks
from fused_attn.nn import element_dropout, native_layer
from fused_attn.nn.arguments import accepts, given, runs_methods_of
from fused_attn.nn.attention import AttentionCache, FusedMultiheadAttention
from fused_attn.nn.layer_blocks import (
    caches_of_layers,
    check_cache,
    feed_forward,
    residual,
    self_attention,
    seqlen_of,
    takes_cache,
)
from fused_attn.nn.layer_checks import (
    check_compared,
    check_decoder_masks,
    check_hint,
    check_layer,
    check_layer_cache,
    check_layout,
    check_memory,
    check_ranges,
    check_stack,
    check_takes_ranges,
    takes_ranges,
)
from fused_attn.nn.layer_conversion import OWN_CLASSES, fuse_layers
from fused_attn.nn.plain import FORWARDS, is_called_plainly
from fused_attn.nn.restoring import restoring_layers
from fused_attn.nn.stack_masks import dense_mask, mask_and_flag
from fused_attn.nn.tracing import call_node

if TYPE_CHECKING:
    from fused_attn.nn.cache import KVCache, LayerCache


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
            x = step.run() if step else residual(self, tgt, self.norm1, lambda y: self._sa_block(y, *own_masks, **own))
            step = None
            if is_native and memory_key_ranges is None:
                step = native_layer.cross_attention(self, x, memory, cross_masks, cross.get("cache"))
            if step:
                y = step.run()
            else:
                y = residual(self, x, self.norm2, lambda z: self._mha_block(z, memory, *cross_masks, **cross))
            step = native_layer.feed_forward(self, y) if is_native else None
            return step.run() if step else residual(self, y, self.norm3, self._ff_block)

    @property
    def takes_is_causal(self) -> bool:
        """Whether tgt_is_causal=True without a mask is the causal mask. Methods of a subclass may not read the flag."""
        is_own = runs_methods_of(TransformerDecoderLayer, self, "forward", "_sa_block")
        return is_own and getattr(self.self_attn, "takes_is_causal", False)

    @property
    def takes_cache(self) -> bool:
        """Whether a cache may be passed. The class of the self-attention decides this."""
        return takes_cache(self)

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
        return self_attention(self, x, is_causal, attn_mask, key_padding_mask, key_ranges, cache)

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
        return feed_forward(self, x, self.dropout3)


DECODER_BLOCKS = native_layer.blocks_of(TransformerDecoderLayer)
OWN_CLASSES[nn.TransformerDecoderLayer] = TransformerDecoderLayer


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
        fuse_layers(self.layers, backend)

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
            TypeError: the cache is no `KVCache`, ranges are no int32 tensor, or tgt or memory is a nested tensor with
                layout=torch.strided.
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
        check_layout(tgt=tgt, memory=memory)
        ranges = given(tgt_key_ranges=tgt_key_ranges, memory_key_ranges=memory_key_ranges)
        check_takes_ranges(self, **ranges)
        seqlen = seqlen_of(tgt, self.layers)
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
        caches = caches_of_layers(self, cache)
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
        check_cache(self, cache)
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
OWN_CLASSES[nn.TransformerDecoder] = TransformerDecoder


def _takes_memory(layer: Any, tgt: Tensor, memory: Tensor) -> bool:
    """Whether `check_memory` knows what the layer takes: attention of other classes may take other shapes and masks."""
    is_own = type(layer.self_attn) is type(layer.multihead_attn) is FusedMultiheadAttention
    return is_own and not (tgt.is_nested or memory.is_nested or modes.is_jit_tracing())
