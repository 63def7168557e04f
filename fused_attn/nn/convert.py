"""`convert_attention`: the fused kernel under an existing model."""

from __future__ import annotations

from torch import nn

from fused_attn.nn.attention import check_backend
from fused_attn.nn.replacement import replace_attention
from fused_attn.nn.transformer import convert_layers


def convert_attention(model: nn.Module, backend: str | None = None) -> nn.Module:
    """Replace every `torch.nn.MultiheadAttention` in a model by a `FusedMultiheadAttention`, in place.

    The new modules hold the same Parameter objects and hooks, so optimizers and hook handles stay valid, and training
    mode, dtype, device and requires_grad stay what they are.

    Torch's encoder layers have an inference path that computes attention without calling their attention module. An
    `nn.TransformerEncoderLayer`, `nn.TransformerEncoder`, `nn.TransformerDecoderLayer` or `nn.TransformerDecoder`
    whose attention has been replaced therefore becomes an instance of the subclass of that name in `fused_attn`, with
    all its attributes. Instances of other subclasses keep their class; they, too, call the new attention, since encoder
    layers get a forward pre-hook that does nothing, which keeps torch from the inference path. So does an encoder layer
    to which a `FusedMultiheadAttention` is assigned by hand.

    Instances of subclasses of `nn.MultiheadAttention`, which parametrised modules are, too, and those with a forward of
    their own are left alone, with a warning that names them. A replaced module on which ``compile()`` was called is no
    longer compiled.

    Args:
        model: any module.
        backend: for the new modules, see `fused_attention`.

    Returns:
        The model; a new module if the model itself is an `nn.MultiheadAttention`.

    Raises:
        TypeError: model is no module.
        ValueError: backend is no name of one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_backend(backend)
    fused = replace_attention(model, backend)
    convert_layers(model)
    return fused.get(model, model)
