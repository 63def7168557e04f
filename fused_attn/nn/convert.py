"""`convert_attention`: the fused kernel under an existing model."""

from __future__ import annotations

import warnings

from torch import nn
from torch.nn.utils import parametrize

from fused_attn.nn.attention import FusedMultiheadAttention
from fused_attn.nn.transformer import (
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)


def convert_attention(model: nn.Module, backend: str | None = None) -> nn.Module:
    """Replace every `torch.nn.MultiheadAttention` in a model by a `FusedMultiheadAttention`, in place.

    The new modules hold the same Parameter objects and hooks, so optimizers and hook handles stay valid, and training
    mode, dtype, device and requires_grad stay what they are.

    Torch's encoder layers have an inference path that computes attention without calling their attention module. An
    `nn.TransformerEncoderLayer`, `nn.TransformerEncoder`, `nn.TransformerDecoderLayer` or `nn.TransformerDecoder`
    whose attention has been replaced therefore becomes an instance of the subclass of that name in `fused_attn`, with
    all its attributes. In instances of other subclasses only the inference path is switched off.

    Subclasses of `nn.MultiheadAttention` with a forward of their own and parametrised modules are left alone, with a
    warning that names them.

    Args:
        model: any module.
        backend: for the new modules, see `fused_attention`.

    Returns:
        The model; a new module if the model itself is an `nn.MultiheadAttention`.
    """
    fused: dict[nn.Module, FusedMultiheadAttention] = {}  # one module may be registered in several places
    left_alone = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention) or isinstance(module, FusedMultiheadAttention):
            continue
        if type(module).forward is not nn.MultiheadAttention.forward or parametrize.is_parametrized(module):
            left_alone.append(f"{name or 'the model'} ({type(module).__name__})")
        else:
            fused[module] = FusedMultiheadAttention.from_torch(module, backend)
    if left_alone:
        warnings.warn(
            "convert_attention: left alone, because they are parametrised or have a forward of their own: "
            + ", ".join(left_alone),
            stacklevel=2,
        )
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in fused:
                parent._modules[name] = fused[child]
    _switch_off_fast_paths(model)
    return fused.get(model, model)


def _switch_off_fast_paths(model: nn.Module) -> None:
    # Layers before stacks: what a stack becomes depends on its layers.
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _is_fused(getattr(module, "self_attn", None)):
            if type(module) is nn.TransformerEncoderLayer:
                module.__class__ = TransformerEncoderLayer
            elif not isinstance(module, TransformerEncoderLayer):
                # The flag says whether the inference path knows the activation; the activation itself stays.
                module.activation_relu_or_gelu = 0
        elif type(module) is nn.TransformerDecoderLayer and _is_fused(module.self_attn, module.multihead_attn):
            module.__class__ = TransformerDecoderLayer
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(map(_has_fused_attention, module.layers)):
            module.use_nested_tensor = False
            if type(module) is nn.TransformerEncoder:
                module.__class__ = TransformerEncoder
        elif type(module) is nn.TransformerDecoder and any(map(_has_fused_attention, module.layers)):
            module.__class__ = TransformerDecoder


def _is_fused(*attention: nn.Module | None) -> bool:
    return all(isinstance(module, FusedMultiheadAttention) for module in attention)


def _has_fused_attention(layer: nn.Module) -> bool:
    return any(isinstance(module, FusedMultiheadAttention) for module in layer.modules())
