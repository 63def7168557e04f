"""`convert_attention` puts the fused kernel under an existing model."""

from __future__ import annotations

import warnings

from torch import nn

from fused_attn.nn.attention import FusedMultiheadAttention, check_backend, keep_fast_path_off
from fused_attn.nn.transformer import (
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)


def convert_attention(model: nn.Module, backend: str | None = None) -> nn.Module:
    """Replace every `torch.nn.MultiheadAttention` in a model by a `FusedMultiheadAttention`, in place.

    >>> import torch
    >>> from fused_attn import convert_attention
    >>> layer = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True)
    >>> model = convert_attention(torch.nn.TransformerEncoder(layer, num_layers=2))
    >>> type(model.layers[0].self_attn).__name__
    'FusedMultiheadAttention'

    The new modules hold the same Parameter objects and hooks, so optimizers and handles of hooks stay valid. Training
    mode, dtype, device and requires_grad stay what they are.

    torch's encoder layers have an inference path that computes attention without calling their attention module. Two
    things keep a layer from this path:

    - An `nn.TransformerEncoderLayer`, `nn.TransformerEncoder`, `nn.TransformerDecoderLayer` or `nn.TransformerDecoder`
      whose attention has been replaced gets another class: the subclass of the same name in `fused_attn`. All
      attributes stay.
    - Instances of other subclasses keep their class. Encoder layers among them get a forward pre-hook that does
      nothing, because torch leaves the inference path if there is a hook. An encoder layer also gets this hook if a
      `FusedMultiheadAttention` is assigned by hand.

    Some modules are left alone, and a warning names them:

    - instances of subclasses of `nn.MultiheadAttention`; parametrised modules are such instances,
    - modules with a forward of their own.

    If ``compile()`` was called on a module that is replaced, the new module is not compiled.

    Args:
        model: any module.
        backend: the backend of the new modules, see `fused_attention`.

    Returns:
        The model. If the model itself is an `nn.MultiheadAttention`, the new module.

    Raises:
        TypeError: model is no module.
        ValueError: there is no backend of this name.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_backend(backend)
    fused: dict[nn.Module, FusedMultiheadAttention] = {}  # one module may be registered in several places
    left_alone = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention) or isinstance(module, FusedMultiheadAttention):
            continue
        if type(module) is not nn.MultiheadAttention or "forward" in vars(module):
            left_alone.append(f"{name or 'the model'} ({type(module).__name__})")
        else:
            fused[module] = FusedMultiheadAttention.from_torch(module, backend)
    if left_alone:
        warnings.warn(
            "convert_attention: left alone, because they are of a subclass, parametrised or with a forward of their "
            "own: " + ", ".join(left_alone),
            stacklevel=2,
        )
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in fused:
                parent._modules[name] = fused[child]
    _convert_layers(model)
    return fused.get(model, model)


def _convert_layers(model: nn.Module) -> None:
    # Layers come before stacks, because the class of a stack depends on its layers.
    for module in model.modules():
        if type(module) is nn.TransformerEncoderLayer and _is_fused(module.self_attn):
            module.__class__ = TransformerEncoderLayer
        elif isinstance(module, nn.TransformerEncoderLayer):
            keep_fast_path_off(module, "self_attn", module.self_attn)
        elif type(module) is nn.TransformerDecoderLayer and _is_fused(module.self_attn, module.multihead_attn):
            module.__class__ = TransformerDecoderLayer
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(map(_has_fused_attention, module.layers)):
            # The constructor decided this from the attention that was there before.
            module.use_nested_tensor = False
            if type(module) is nn.TransformerEncoder:
                module.__class__ = TransformerEncoder
        elif type(module) is nn.TransformerDecoder and any(map(_has_fused_attention, module.layers)):
            module.__class__ = TransformerDecoder


def _is_fused(*attention: nn.Module) -> bool:
    return all(isinstance(module, FusedMultiheadAttention) for module in attention)


def _has_fused_attention(layer: nn.Module) -> bool:
    return any(isinstance(module, FusedMultiheadAttention) for module in layer.modules())
