"""The parts of an encoder or decoder layer without gradients on a CPU: modules with residual connection and layer norm.

With few rows, calling the operators one by one takes longer than the arithmetic. Here, an attention with all that
surrounds it is one native call, and a feed-forward block is two. With many rows, torch multiplies, and a native call
does all that follows a product in one pass over the rows.

Each function returns what computes a part of the layer, and computes nothing itself. A layer runs the parts at once.
`record` keeps those of a whole decoder. A generation runs them for every token, without asking again what may run.

Each function returns None if a native call cannot take the place of the layer's own modules, for instance because one
of them has hooks or is of another class. The layer then calls its modules. `is_plain` must be true of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _get_tracing_state

from fused_attn import modes
from fused_attn.nn import native_attention, native_linear
from fused_attn.nn.attention import FusedMultiheadAttention
from fused_attn.nn.native_call import NativeCall
from fused_attn.nn.plain import does_nothing, is_called_plainly, is_plain_linear, is_plain_norm
from fused_attn.nn.restoring import Restoring

Layer = nn.TransformerEncoderLayer | nn.TransformerDecoderLayer

#: attn_mask, key_padding_mask and is_causal
Masks = tuple[Tensor | None, Tensor | None, bool]

#: Activations that torch can apply to each element by itself. The native linear layers surround them.
ELEMENTWISE = (F.relu, F.gelu, F.silu, F.elu, F.selu, F.mish, F.leaky_relu, torch.relu, torch.tanh, torch.sigmoid)


class Blocks(NamedTuple):
    """A class of layers, and its own methods that compute it. A patch of the class may replace these."""

    kind: type
    methods: dict[str, Any]


class Steps(NamedTuple):
    """Calls that write `out`, anew each time they run. They read the tensors for which they were made."""

    calls: tuple[Callable[[], Any], ...]
    out: Tensor

    def run(self) -> Tensor:
        for call in self.calls:
            call()
        return self.out


def blocks_of(kind: type) -> Blocks:
    """What `is_plain` needs to know of a class of layers. To be called when the class is defined."""
    names = {"forward", "_sa_block", "_mha_block", "_ff_block"} & vars(kind).keys()
    return Blocks(kind, {name: vars(kind)[name] for name in names})


def is_plain(layer: nn.Module, blocks: Blocks) -> bool:
    """Whether the parts of the layer may be native calls, if its modules allow that.

    Gradients are off, nothing is traced, and nothing but the modules of the layer decides what its blocks compute: the
    layer is of the class itself, and nobody has replaced a method.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(layer) is not blocks.kind:
        return False
    # torch.jit traces once more without gradients, and compares the graphs. Even a size that is read is in the graph.
    if _get_tracing_state() is not None:
        return False
    return not layer.__dict__.keys() & blocks.methods.keys() and all(
        getattr(blocks.kind, name) is method for name, method in blocks.methods.items()
    )


def self_attention(layer: Layer, x: Tensor, masks: Masks, cache: Any = None) -> Steps | None:
    """Computes the self-attention, around which stand the residual connection and the layer norm.

    x: (N, L, E). With a cache: (N, 1, E), or (1, N, E) without batch_first
    """
    modules: Any = layer._modules  # attributes of modules take three times as long
    parts = modules.get("self_attn"), modules.get("norm1"), modules.get("dropout1")
    return _attention(layer, *parts, x, x, masks, cache)


def cross_attention(
    layer: nn.TransformerDecoderLayer, x: Tensor, memory: Tensor, masks: Masks, cache: Any
) -> Steps | None:
    """Computes the cross-attention, around which stand the residual connection and the layer norm."""
    modules: Any = layer._modules
    parts = modules.get("multihead_attn"), modules.get("norm2"), modules.get("dropout2")
    return _attention(layer, *parts, x, memory, masks, cache)


def feed_forward(layer: Layer, x: Tensor) -> Steps | None:
    """Computes the feed-forward block, around which stand the residual connection and the layer norm."""
    modules: Any = layer._modules
    block = 3 if "multihead_attn" in modules else 2  # the number of the block in the layer
    norm, last_dropout, first, last = (
        modules.get(name) for name in (f"norm{block}", f"dropout{block}", "linear1", "linear2")
    )
    activation = layer.__dict__.get("activation")  # a function; a module is in `_modules`
    if (
        first is None
        or last is None
        or not is_plain_linear(first)
        or not is_plain_linear(last)
        or activation not in ELEMENTWISE
        or not does_nothing(modules.get("dropout"))
        or not does_nothing(last_dropout)
        or not is_plain_norm(norm, x)
    ):
        return None
    source = torch.empty_like(x) if layer.norm_first else x
    is_relu = activation is F.relu
    expand = native_linear.native_call(first, source, takes_many=not layer.training, relu=is_relu)
    if expand is None:
        return None
    hidden = expand.out
    last_norm = None if layer.norm_first else norm
    contract = native_linear.native_call(last, hidden, takes_many=not layer.training, residual=x, norm=last_norm)
    if contract is None:
        return None
    normalise = (lambda: source.copy_(norm(x)),) if layer.norm_first else ()
    activate = () if is_relu else (lambda: hidden.copy_(activation(hidden)),)
    return Steps((*normalise, expand.run, *activate, contract.run), contract.out)


def add_and_normalise(layer: nn.Module, x: Tensor, y: Tensor, norm: Any) -> NativeCall | None:
    """Computes ``norm(x + y)``, where y is what a block of the layer has computed. The layer need not be plain."""
    # Even a size that is read is in the graph of a tracer, so the modes come before the norm.
    if torch.is_grad_enabled() or layer.training or not x.is_cpu or not modes.is_direct() or not is_plain_norm(norm, x):
        return None
    return native_linear.add_and_normalise(x, y, norm)


class RecordedStep:
    """The calls of `record`. The object keeps the cache alive, and the cache does not know the object."""

    def __init__(
        self, row: Tensor, calls: tuple[Callable[[], Any], ...], out: Tensor, norm: nn.Module | None, caches: Any
    ):
        self._row, self._calls, self._out, self._norm = row, calls, out, norm
        self._own = [cache.self_attention for cache in caches]
        self._parts = [*self._own, *(cache.cross_attention for cache in caches)]
        self._buffers = [part.state()[0] for part in self._parts]

    def has_its_buffers(self) -> bool:
        """Whether the cache still has the tensors that the calls read and write."""
        return all(part.state()[0] is buffers for part, buffers in zip(self._parts, self._buffers, strict=True))

    def can_run(self, tgt: Tensor) -> bool:
        """Whether the calls compute what the decoder itself would compute now, and leave nothing out."""
        row = self._row
        return (
            type(tgt) is Tensor
            and tgt.shape == row.shape
            and tgt.dtype == row.dtype
            and tgt.device == row.device
            and not torch.is_grad_enabled()
            and (torch.is_inference_mode_enabled() or not row.is_inference())
            and not modes.is_any_autocast_enabled()
            and modes.is_direct()
            and all(cache.has_room() for cache in self._own)
            and self.has_its_buffers()
        )

    def run(self, tgt: Tensor) -> Tensor:
        """The output of the decoder for the rows `tgt`. `can_run` must be true."""
        with Restoring(self._parts):
            self._row.copy_(tgt)
            for call in self._calls:
                call()
            return self._out if self._norm is None else self._norm(self._out)


def record(
    layers: Iterable[Any],
    blocks: Blocks,
    norm: nn.Module | None,
    tgt: Tensor,
    memory: Tensor,
    padding: Tensor | None,
    cache: Any,
) -> RecordedStep | None:
    """The calls that compute the output of a decoder for one new row of each target; None if there are none.

    layers, norm: those of the decoder
    blocks: of the class that the layers must be of
    tgt: (N, 1, E), or (1, N, E) without batch_first: a row of the kind that the step will get
    memory, padding: those of every step
    cache: the cache of the decoder, with an entry for each layer. It has at least one row already
    """
    # Contiguous, because a part would else make a copy, once, and read the copy in every step.
    x = row = torch.empty(tgt.shape, dtype=tgt.dtype, device=tgt.device)
    calls: list[Callable[[], Any]] = []
    for layer, layer_cache in zip(layers, cache.layers, strict=True):
        if not (is_plain(layer, blocks) and is_called_plainly(layer)):
            return None
        own, cross = layer_cache.self_attention, layer_cache.cross_attention
        for part, arguments in (
            (self_attention, ((None, None, False), own)),
            (cross_attention, (memory, (None, padding, False), cross)),
            (feed_forward, ()),
        ):
            steps = part(layer, x, *arguments)
            if steps is None:
                return None
            calls += steps.calls
            x = steps.out

    return RecordedStep(row, tuple(calls), x, norm, cache.layers)


def _attention(
    layer: Layer,
    module: nn.Module | None,
    norm: Any,
    dropout: nn.Module | None,
    x: Tensor,
    key: Tensor,
    masks: Masks,
    cache: Any,
) -> Steps | None:
    """Computes ``norm(x + module(x, key))``, or ``x + module(norm(x), key)`` if norm_first."""
    attn_mask, key_padding_mask, is_causal = masks
    if (
        attn_mask is not None
        or type(module) is not FusedMultiheadAttention
        or not is_called_plainly(module)
        or not does_nothing(dropout)
        or not is_plain_norm(norm, x)
    ):
        return None
    around = {"norm": norm, "norm_first": layer.norm_first}
    call: Any
    if cache is not None:
        call = native_attention.attention_step(module, x, key, key_padding_mask, is_causal, key is x, cache, **around)
    elif (
        key is not x
        or (module.skip_padded_queries and key_padding_mask is not None)
        or (layer.training and not native_attention.is_small(module, x))
    ):
        return None
    else:
        call = native_attention.self_attention(module, x, key_padding_mask, is_causal, **around)
    return None if call is None else Steps((call.run,), call.out)
