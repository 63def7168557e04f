"""The masks that a stack passes to its layers: a flag in the place of a causal mask, or a dense mask."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_attn import modes
from fused_attn.attention import checks
from fused_attn.attention.causal_bias import causal_bias


def mask_and_flag(
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


def dense_mask(mask: Tensor | None, is_causal: bool | None, seqlen: int, x: Tensor) -> Tensor | None:
    """The mask for layers of other classes, which read a mask and not the flag is_causal.

    A causal bias, or is_causal=True without a mask, becomes a bool mask (L, S), in which True hides the key.

    x: the input of the stack
    """
    bias = None if mask is None else causal_bias(mask)
    if bias is None and not (mask is None and is_causal):
        return mask
    if x.is_nested:
        expected = (
            "False with nested tensors, as a layer may not read the flag unless takes_is_causal of its class is True"
        )
        raise checks.fail("is_causal", expected, True)
    rows, columns, offset = (seqlen, seqlen, 0) if bias is None else bias[:3]
    return torch.ones(rows, columns, dtype=torch.bool, device=x.device).triu(offset + 1)


def _can_look_at(mask: Tensor) -> bool:
    """Whether the contents of the mask may be compared.

    Traced graphs, captured ones and transforms cannot read values, and a mask on "meta" has none. A mask that requires
    grad must be used itself.
    """
    return not mask.requires_grad and modes.has_values(mask)


def _is_causal(mask: Tensor, seqlen: int) -> bool:
    """Whether the mask is (L, L) and hides the scores above the diagonal and no others, as True or as -inf."""
    if mask.shape != (seqlen, seqlen):
        return False
    hidden = torch.ones(mask.shape, dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype == torch.bool:
        return torch.equal(mask, hidden)
    return torch.equal(mask, torch.zeros_like(mask).masked_fill(hidden, float("-inf")))
