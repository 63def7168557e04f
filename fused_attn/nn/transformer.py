"""`torch.nn.Transformer` and its parts on `FusedMultiheadAttention`.

Thin subclasses: parameters, feed-forward blocks and initialisation are the parents'. What differs: attention is always
the fused kernel (no inference fast path, no nested tensors), boolean masks stay boolean, so that the kernel can skip
padding, and decoders take a cache.

What a stack passes to its layers are plain tensors, for hooks, checkpoints and mixed precision to handle; a mask that
proves causal becomes None with is_causal=True. Layers whose ``takes_is_causal`` is not set are passed what torch's
stacks pass, and a cache goes only where ``takes_cache`` is set. Wrappers of a layer pass these attributes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import has_torch_function_variadic

from fused_attn import checks
from fused_attn.masks import causal_bias
from fused_attn.nn.attention import (
    AttentionCache,
    FusedMultiheadAttention,
    accepts_cache,
    batch_layout,
    check_divides,
    check_sizes,
)
from fused_attn.nn.tracing import call_node

if TYPE_CHECKING:
    from fused_attn.nn.cache import KVCache, LayerCache


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` on the fused kernel, in training and inference alike.

    Constructor, forward contract and state-dict keys are the parent's; ``backend`` is that of `fused_attention`.
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
        check_layer(d_model, nhead, dim_feedforward, dropout, layer_norm_eps)
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
            src_mask: (S, S) or (N * nhead, S, S); bool (True = may NOT attend) or floating point.
            src_key_padding_mask: (N, S) or (S,); bool (True = ignore) or floating point.
            is_causal: a hint that src_mask is the causal mask, see `FusedMultiheadAttention`; without a src_mask, the
                causal mask itself.
        """
        if has_torch_function_variadic(src):
            node = call_node(self, src, src_mask, src_key_padding_mask, is_causal)
            if node is not None:
                return node
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), src_mask, src_key_padding_mask, is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, src_mask, src_key_padding_mask, is_causal))
        return self.norm2(x + self._ff_block(x))

    @property
    def takes_is_causal(self) -> bool:
        """is_causal=True without a mask is the causal mask."""
        return getattr(self.self_attn, "takes_is_causal", False)


class TransformerEncoder(nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder` without nested tensors: padded positions hold what they hold in training mode.

    Constructor, forward contract and state-dict keys are the parent's. The attention of the layers is converted with
    `convert_attention`, so torch's own layers may be passed too.

    Args:
        encoder_layer: copied num_layers times.
        num_layers: how often.
        norm: applied to the output of the last layer.
        enable_nested_tensor: accepted for compatibility, without effect.
        mask_check: likewise.
        backend: see `fused_attention`; None leaves that of encoder_layer as it is.
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
        check_sizes(0, num_layers=num_layers)
        # False, or the parent warns about layers that its fast path cannot take.
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
            mask: (S, S) or (N * nhead, S, S); bool (True = may NOT attend) or floating point.
            src_key_padding_mask: (N, S) or (S,); bool (True = ignore) or floating point.
            is_causal: a hint that mask is the causal mask, None = look; without a mask, the causal mask itself.
        """
        if has_torch_function_variadic(src):
            node = call_node(self, src, mask, src_key_padding_mask, is_causal)
            if node is not None:
                return node
        if src.is_nested:
            raise AssertionError("src: expected a padded tensor with a src_key_padding_mask, got a nested tensor")
        seqlen = _seqlen(src, self.layers)
        if not all(getattr(layer, "takes_is_causal", False) for layer in self.layers):
            # Layers of other classes get the masks in the form in which the parent class passes them.
            mask = _dense_mask(mask, is_causal, seqlen, src.device)
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        mask, is_causal = _causal_mask(mask, is_causal, src_key_padding_mask, seqlen)
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal)
        return src if self.norm is None else self.norm(src)

    #: is_causal=True without a mask is the causal mask, whatever the layers.
    takes_is_causal = True


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` on the fused kernel, with a cache for decoding step by step.

    Constructor, forward contract and state-dict keys are the parent's; ``backend`` is that of `fused_attention`.
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
        check_layer(d_model, nhead, dim_feedforward, dropout, layer_norm_eps)
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        self.self_attn = FusedMultiheadAttention.from_torch(self.self_attn, backend)
        self.multihead_attn = FusedMultiheadAttention.from_torch(self.multihead_attn, backend)

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
            tgt: the target sequences; with a cache their new rows.
            memory: the encoder's output, (S, N, E), or (N, S, E) with batch_first, or (S, E).
            tgt_mask: (T, T) or (N * nhead, T, T); bool (True = may NOT attend) or floating point.
            memory_mask: (T, S) or (N * nhead, T, S), likewise.
            tgt_key_padding_mask: (N, T) or (T,); bool (True = ignore) or floating point. With a cache it covers all
                rows so far.
            memory_key_padding_mask: (N, S) or (S,), likewise.
            tgt_is_causal: a hint that tgt_mask is the causal mask, see `FusedMultiheadAttention`; without a tgt_mask,
                the causal mask itself.
            memory_is_causal: likewise for memory_mask.
            cache: what earlier calls have computed, with ``.self_attention`` and ``.cross_attention``. Self-attention
                is then causal without a tgt_mask, and keys and values of the memory are computed once (by a
                ``multihead_attn`` that takes no cache, each time).
        """
        if has_torch_function_variadic(tgt, memory):
            masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
            options = {} if cache is None else {"cache": cache}
            node = call_node(self, tgt, memory, *masks, tgt_is_causal, memory_is_causal, **options)
            if node is not None:
                return node
        if cache is not None and not hasattr(cache, "self_attention"):
            raise TypeError(f"cache: expected a layer's cache such as cache.layers[i], got {type(cache).__name__}")
        # Methods of subclasses may have torch's own signatures.
        own: dict[str, Any] = {} if cache is None else {"cache": cache.self_attention}
        cross: dict[str, Any] = {}
        if cache is not None and accepts_cache(self._mha_block):
            cross["cache"] = cache.cross_attention
        own_masks = tgt_mask, tgt_key_padding_mask, tgt_is_causal
        cross_masks = memory_mask, memory_key_padding_mask, memory_is_causal
        x = tgt
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), *own_masks, **own)
            x = x + self._mha_block(self.norm2(x), memory, *cross_masks, **cross)
            return x + self._ff_block(self.norm3(x))
        x = self.norm1(x + self._sa_block(x, *own_masks, **own))
        x = self.norm2(x + self._mha_block(x, memory, *cross_masks, **cross))
        return self.norm3(x + self._ff_block(x))

    @property
    def takes_is_causal(self) -> bool:
        """tgt_is_causal=True without a mask is the causal mask."""
        return getattr(self.self_attn, "takes_is_causal", False)

    @property
    def takes_cache(self) -> bool:
        """Whether a cache may be passed, which is for the self-attention to say."""
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
        masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        options: dict[str, Any] = {"is_causal": is_causal}
        if cache is not None:
            options["cache"] = cache
        return self.dropout1(self.self_attn(x, x, x, need_weights=False, **masks, **options)[0])

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
        masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        options: dict[str, Any] = {"is_causal": is_causal}
        if cache is not None and getattr(self.multihead_attn, "takes_cache", False):
            options["cache"] = cache
        return self.dropout2(self.multihead_attn(x, mem, mem, need_weights=False, **masks, **options)[0])


class TransformerDecoder(nn.TransformerDecoder):
    """`torch.nn.TransformerDecoder` with a cache for decoding step by step.

    Constructor, forward contract and state-dict keys are the parent's. The attention of the layers is converted with
    `convert_attention`, so torch's own layers may be passed too.

    Args:
        decoder_layer: copied num_layers times.
        num_layers: how often.
        norm: applied to the output of the last layer.
        backend: see `fused_attention`; None leaves that of decoder_layer as it is.
    """

    def __init__(
        self,
        decoder_layer: nn.TransformerDecoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        *,
        backend: str | None = None,
    ):
        check_sizes(0, num_layers=num_layers)
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
        """The output of the last layer, laid out as tgt. The arguments are those of `TransformerDecoderLayer`.

        Args:
            tgt_is_causal: a hint that tgt_mask is the causal mask, None = look; without a tgt_mask, the causal mask
                itself.
            cache: a `KVCache` with one entry per layer, for this memory alone.

        Raises:
            TypeError: the cache is no `KVCache`.
            ValueError: the cache does not fit the layers, some layer takes none, or memory is not the one of the
                cache's first step.
        """
        if has_torch_function_variadic(tgt, memory):
            masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
            options = {} if cache is None else {"cache": cache}
            node = call_node(self, tgt, memory, *masks, tgt_is_causal, memory_is_causal, **options)
            if node is not None:
                return node
        seqlen = _seqlen(tgt, self.layers)
        if cache is None and not all(getattr(layer, "takes_is_causal", False) for layer in self.layers):
            tgt_mask = _dense_mask(tgt_mask, tgt_is_causal, seqlen, tgt.device)
            return super().forward(
                tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
                tgt_is_causal, memory_is_causal,
            )  # fmt: skip
        if cache is None:
            caches: list[Any] = [{}] * len(self.layers)
        elif not hasattr(cache, "layers"):
            raise TypeError(f"cache: expected a KVCache, got {type(cache).__name__}")
        elif len(cache.layers) != len(self.layers):
            raise ValueError(f"cache: expected one for {len(self.layers)} layers, got one for {len(cache.layers)}")
        elif not self.takes_cache:
            raise ValueError("cache: expected None, since a layer or its self-attention takes no cache, got one")
        else:
            caches = [{"cache": layer_cache} for layer_cache in cache.layers]
            self._check_memory(tgt, memory, memory_key_padding_mask, cache)
        tgt_mask, tgt_is_causal = _causal_mask(tgt_mask, tgt_is_causal, tgt_key_padding_mask, seqlen)
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

    #: tgt_is_causal=True without a mask is the causal mask, whatever the layers.
    takes_is_causal = True

    @property
    def takes_cache(self) -> bool:
        """Whether a cache may be passed: every layer takes its part of one."""
        return all(getattr(layer, "takes_cache", False) for layer in self.layers)

    def _check_memory(self, tgt: Tensor, memory: Tensor, key_padding_mask: Tensor | None, cache: KVCache) -> None:
        """Raises what cross-attention would: after self-attention has added its rows, the cache would be of no use."""
        if memory.dim() != tgt.dim():
            raise AssertionError(f"memory: expected {tgt.dim()} dimensions, as tgt has, got {tuple(memory.shape)}")
        if memory.dim() == 3:
            batch_dim = 0 if self.layers[0].self_attn.batch_first else 1
            batch, length = memory.shape[batch_dim], memory.shape[1 - batch_dim]
            if batch != tgt.shape[batch_dim]:
                raise RuntimeError(
                    f"memory: expected the batch size of tgt, {tgt.shape[batch_dim]}, got {batch}; "
                    + batch_layout(batch_dim == 0)
                )
            expected: tuple[int, ...] = (batch, length)
        else:
            expected = memory.shape[:1]
        if key_padding_mask is not None and key_padding_mask.shape != expected:
            raise AssertionError(
                f"memory_key_padding_mask: expected shape {tuple(expected)}, got {tuple(key_padding_mask.shape)}"
            )
        if type(self.layers[0]) is TransformerDecoderLayer:  # another class may hand something else to its attention
            cache.layers[0].cross_attention.get(memory)


class Transformer(nn.Transformer):
    """`torch.nn.Transformer` on the fused kernel.

    Constructor, forward contract and state-dict keys are the parent's; ``backend`` is that of `fused_attention`. Custom
    encoders and decoders are used as they are.
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

        def stack(stack_class: type, layer_class: type, num_layers: int) -> nn.Module:
            layer = layer_class(
                d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
                device, dtype, backend=backend,
            )  # fmt: skip
            norm = nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, device=device, dtype=dtype)
            return stack_class(layer, num_layers, norm)

        # In the parent's order, so that one seed gives the same weights.
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
            src: (S, N, E), or (N, S, E) with batch_first, or (S, E); of the encoder.
            tgt: (T, N, E), or (N, T, E) with batch_first, or (T, E); of the decoder.

        The others are those of `TransformerEncoder` and `TransformerDecoder`.

        Raises:
            RuntimeError: src and tgt do not belong together, or a hint comes without its mask.
        """
        if has_torch_function_variadic(src, tgt):
            masks = (src_mask, tgt_mask, memory_mask, src_key_padding_mask, tgt_key_padding_mask)
            hints = (memory_key_padding_mask, src_is_causal, tgt_is_causal, memory_is_causal)
            node = call_node(self, src, tgt, *masks, *hints)
            if node is not None:
                return node
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


def check_layer(d_model: int, nhead: int, dim_feedforward: int, dropout: float, layer_norm_eps: float = 1e-5) -> None:
    """Raises TypeError or ValueError where the arguments make no layer."""
    check_sizes(1, d_model=d_model, nhead=nhead)
    check_sizes(0, dim_feedforward=dim_feedforward)
    check_divides("nhead", nhead, "d_model", d_model)
    checks.check_probability("dropout", dropout)
    if not layer_norm_eps >= 0.0:
        raise checks.fail("layer_norm_eps", "a number >= 0", layer_norm_eps)


def _fuse(layers: nn.ModuleList, backend: str | None) -> None:
    # Imported here: that module needs the classes of this one.
    from fused_attn.nn.convert import convert_attention

    convert_attention(layers, backend)
    if backend is not None:
        for module in layers.modules():
            if isinstance(module, FusedMultiheadAttention):
                module.backend = backend


def _seqlen(x: Tensor, layers: nn.ModuleList) -> int:
    first: Any = layers[0]
    return x.shape[1 if x.dim() == 3 and first.self_attn.batch_first else 0]


def _causal_mask(
    mask: Tensor | None, is_causal: bool | None, key_padding_mask: Tensor | None, seqlen: int
) -> tuple[Tensor | None, bool]:
    """(mask, is_causal) for the layers of a stack; a mask that proves causal is replaced by what costs no memory.

    Without padding the layers believe the hint. With padding they would read the mask; comparing it once here saves
    every layer that. On a GPU this waits for the device, as `torch.nn.Transformer` does whenever it gets no hint; a
    ``torch.nn.attention.bias.causal_upper_left(L, L)`` as mask, or is_causal=True without one, needs no look.
    """
    if mask is None:
        return None, bool(is_causal)
    bias = causal_bias(mask)
    if bias is not None:
        # It is no tensor that holds anything, so it ends here unless it does not fit, which attention explains.
        return (None, True) if bias == (seqlen, seqlen, 0) else (mask, bool(is_causal))
    if is_causal is not None and key_padding_mask is None:
        return mask, is_causal
    if is_causal is False or not _can_look_at(mask) or not _is_causal(mask, seqlen):
        return mask, bool(is_causal)
    return (mask if key_padding_mask is None else None), True


def _dense_mask(mask: Tensor | None, is_causal: bool | None, seqlen: int, device: torch.device) -> Tensor | None:
    """The mask for layers that read it: a causal bias, or is_causal=True without a mask, as (L, S), True = hidden."""
    bias = None if mask is None else causal_bias(mask)
    if bias is None and not (mask is None and is_causal):
        return mask
    rows, columns, offset = bias or (seqlen, seqlen, 0)
    return torch.ones(rows, columns, dtype=torch.bool, device=device).triu(offset + 1)


def _can_look_at(mask: Tensor) -> bool:
    """Values can be read neither in a traced graph nor in a captured one, and a learnable mask must be used itself."""
    if torch.compiler.is_compiling() or mask.requires_grad:
        return False
    return not (mask.is_cuda and torch.cuda.is_current_stream_capturing())


def _is_causal(mask: Tensor, seqlen: int) -> bool:
    """The mask is (L, L) and hides, as bool or as -inf, what lies above the diagonal, and nothing else."""
    if mask.shape != (seqlen, seqlen):
        return False
    hidden = torch.ones(mask.shape, dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype == torch.bool:
        return torch.equal(mask, hidden)
    return torch.equal(mask, torch.zeros_like(mask).masked_fill(hidden, float("-inf")))
