"""`torch.nn.Transformer` on `FusedMultiheadAttention`; encoder.py and decoder.py have its parts.

All these classes are thin subclasses. Parameters, feed-forward blocks and initialisation are those of the parents.
Three things differ:

- Attention always runs on the fused kernel. There is no inference fast path, so no nested tensors are made.
- Bool masks stay bool, so that the kernel can skip padding. Ranges of keys take the place of a mask (L, S).
- Encoders and decoders take a cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import has_torch_function_variadic

from fused_attn.attention import checks
from fused_attn.nn.arguments import batch_layout, check_sizes, given
from fused_attn.nn.decoder import TransformerDecoder, TransformerDecoderLayer
from fused_attn.nn.encoder import TransformerEncoder, TransformerEncoderLayer
from fused_attn.nn.layer_checks import (
    check_compared,
    check_decoder_masks,
    check_hint,
    check_layout,
    check_module,
    check_takes_ranges,
)
from fused_attn.nn.tracing import call_node


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
            TypeError: src or tgt is a nested tensor with layout=torch.strided, or ranges of keys are no int32 tensor.
            ValueError: ranges of keys do not fit, or a layer takes none.
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
        check_layout(src=src, tgt=tgt)
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
