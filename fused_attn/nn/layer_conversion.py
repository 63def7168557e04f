"""Turns torch's layers and stacks whose attention is fused into the classes of this package."""

from __future__ import annotations

from typing import Any

from torch import nn

from fused_attn.nn.arguments import check_backend
from fused_attn.nn.attention import FusedMultiheadAttention
from fused_attn.nn.fast_path import keep_fast_path_off
from fused_attn.nn.replacement import replace_attention

#: The class of this package for each class of torch. encoder.py and decoder.py put in what they define.
OWN_CLASSES: dict[type[nn.Module], Any] = {}


def fuse_layers(layers: nn.ModuleList, backend: str | None) -> None:
    """Puts the layers of a stack on the fused kernel, in place. None leaves the backends as they are."""
    check_backend(backend)
    replace_attention(layers, backend)
    convert_layers(layers)
    if backend is not None:
        for module in layers.modules():
            if isinstance(module, FusedMultiheadAttention):
                module.backend = backend


def convert_layers(model: nn.Module) -> None:
    """Turns torch's layers and stacks that contain fused attention into the classes of this package, in place.

    `fused_attn.convert_attention` calls this function after it has replaced the attention.
    """
    # The layers come before the stacks, because the class of a stack depends on its layers.
    for module in model.modules():
        if type(module) is nn.TransformerEncoderLayer and _is_fused(module.self_attn):
            module.__class__ = OWN_CLASSES[nn.TransformerEncoderLayer]
        elif isinstance(module, nn.TransformerEncoderLayer):
            keep_fast_path_off(module, "self_attn", module.self_attn)
        elif type(module) is nn.TransformerDecoderLayer and _is_fused(module.self_attn, module.multihead_attn):
            module.__class__ = OWN_CLASSES[nn.TransformerDecoderLayer]
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(map(_has_fused_attention, module.layers)):
            # torch decided at construction, from the attention of that time, whether to use nested tensors.
            module.use_nested_tensor = False
            if type(module) is nn.TransformerEncoder:
                module.__class__ = OWN_CLASSES[nn.TransformerEncoder]
        elif type(module) is nn.TransformerDecoder and any(map(_has_fused_attention, module.layers)):
            module.__class__ = OWN_CLASSES[nn.TransformerDecoder]


def _is_fused(*attention: nn.Module) -> bool:
    """Whether all of these modules are `FusedMultiheadAttention`."""
    return all(isinstance(module, FusedMultiheadAttention) for module in attention)


def _has_fused_attention(layer: nn.Module) -> bool:
    """Whether a layer contains a `FusedMultiheadAttention`."""
    return any(isinstance(module, FusedMultiheadAttention) for module in layer.modules())
