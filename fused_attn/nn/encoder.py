"""`torch.nn.TransformerEncoder` and its layer on `FusedMultiheadAttention`.

These are thin subclasses, see transformer.py. layer_blocks.py has what they share with the decoder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import has_torch_function_variadic

from fused_attn.attention import checks
from fused_attn.nn import native_layer, strided
from fused_attn.nn.arguments import accepts, given, runs_methods_of
from fused_attn.nn.attention import AttentionCache, FusedMultiheadAttention
from fused_attn.nn.layer_blocks import (
    caches_of_layers,
    feed_forward,
    residual,
    self_attention,
    seqlen_of,
    takes_cache,
)
from fused_attn.nn.layer_checks import (
    check_compared,
    check_hint,
    check_layer,
    check_layer_cache,
    check_nested_source,
    check_ranges,
    check_stack,
    check_takes_ranges,
    takes_ranges,
)
from fused_attn.nn.layer_conversion import OWN_CLASSES, fuse_layers
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
            x = step.run() if step else residual(self, src, self.norm1, lambda y: self._sa_block(y, *masks, **options))
            step = native_layer.feed_forward(self, x) if is_native else None
            return step.run() if step else residual(self, x, self.norm2, self._ff_block)

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

    def _ff_block(self, x: Tensor) -> Tensor:
        """The feed-forward block of x, after dropout, in the shape of x."""
        return feed_forward(self, x, self.dropout2)

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
        return takes_cache(self)


ENCODER_BLOCKS = native_layer.blocks_of(TransformerEncoderLayer)
OWN_CLASSES[nn.TransformerEncoderLayer] = TransformerEncoderLayer


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
        fuse_layers(self.layers, backend)

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

        src may be a nested tensor (N, length, E) of either layout, if batch_first is set. The output is then nested,
        too. The other arguments except is_causal must be None.

        Raises:
            AssertionError, RuntimeError: src or a mask does not fit, see `FusedMultiheadAttention`.
            TypeError: src or a mask is no tensor, or src_key_ranges or the cache has the wrong type.
            ValueError: src_key_ranges or the cache does not fit, or a layer takes none; or src is nested, and comes
                with a mask, ranges or a cache.
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
        if strided.is_strided(src):
            others = {"mask": mask, "src_key_padding_mask": src_key_padding_mask}
            check_nested_source(self, **others, src_key_ranges=src_key_ranges, cache=cache)
            rows, is_padding, lengths = strided.pad(src)
            # The forward of a subclass has already run up to here.
            out = TransformerEncoder.forward(self, rows, None, is_padding, is_causal)
            return strided.unpad(out, lengths)
        ranges = given(src_key_ranges=src_key_ranges)
        check_takes_ranges(self, **ranges)
        seqlen = seqlen_of(src, self.layers)
        caches = caches_of_layers(self, cache)
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


OWN_CLASSES[nn.TransformerEncoder] = TransformerEncoder
