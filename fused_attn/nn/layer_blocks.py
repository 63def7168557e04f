"""What the layers and the stacks of encoders and decoders share: their blocks, and what a stack passes to its layers.

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

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_attn import modes
from fused_attn.attention import checks
from fused_attn.nn import element_dropout, native_layer, native_linear
from fused_attn.nn.arguments import accepts, given
from fused_attn.nn.paged_self_attention import paged_hint
from fused_attn.nn.plain import is_plain_linear

if TYPE_CHECKING:
    from fused_attn.nn.attention import AttentionCache
    from fused_attn.nn.cache import KVCache


def self_attention(
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


def takes_cache(layer: Any) -> bool:
    """Whether a cache may be passed to a layer. The class of the self-attention decides this."""
    is_accepted = accepts(layer.forward, "cache") and accepts(layer._sa_block, "cache")
    return is_accepted and getattr(layer.self_attn, "takes_cache", False)


def caches_of_layers(stack: Any, cache: KVCache | None) -> list[dict[str, Any]]:
    """What each layer of a stack gets of the cache, as keyword arguments."""
    if cache is None:
        return [{}] * len(stack.layers)
    check_cache(stack, cache)
    return [{"cache": layer_cache} for layer_cache in cache.layers]


def check_cache(stack: Any, cache: Any) -> None:
    """Raises TypeError or ValueError unless the layers of a stack take this cache."""
    if not hasattr(cache, "layers"):
        raise TypeError(f"cache: expected a KVCache, got {type(cache).__name__}{paged_hint(cache)}")
    if len(cache.layers) != len(stack.layers):
        raise checks.fail("cache", f"one for {len(stack.layers)} layers", f"one for {len(cache.layers)}")
    if not stack.takes_cache:
        raise checks.fail("cache", "None, since a layer or its self-attention takes no cache", "one")


def residual(layer: Any, x: Tensor, norm: nn.Module, block: Callable[[Tensor], Tensor]) -> Tensor:
    """The output of a block of a layer, with its residual connection and its layer norm."""
    if layer.norm_first:
        return x + block(norm(x))
    y = block(x)
    step = native_layer.add_and_normalise(layer, x, y, norm)
    return step.run() if step else norm(x + y)


def feed_forward(layer: Any, x: Tensor, last_dropout: nn.Module) -> Tensor:
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


def seqlen_of(x: Tensor, layers: nn.ModuleList) -> int:
    """The length L of x, which is (N, L, E), (L, N, E) or (L, E). The batch_first of the first layer decides."""
    first: Any = layers[0]
    return x.shape[1 if x.dim() == 3 and first.self_attn.batch_first else 0]
