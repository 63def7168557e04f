"""`convert_attention` puts the fused kernel under an existing model."""

from __future__ import annotations

import warnings

from torch import nn

from fused_attn.attention import checks
from fused_attn.nn.arguments import check_backend
from fused_attn.nn.attention import FusedMultiheadAttention
from fused_attn.nn.layer_conversion import convert_layers
from fused_attn.nn.replacement import replace_attention


def convert_attention(model: nn.Module, backend: str | None = None, *, skip_padded_queries: bool = False) -> nn.Module:
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
    - modules with a forward of their own,
    - instances of `FusedMultiheadAttention`, which keep their backend and their skip_padded_queries.

    A model without any of these modules, such as most models of Hugging Face, is returned as it is, with a warning.

    If ``compile()`` was called on a module that is replaced, the new module is not compiled.

    Args:
        model: any module.
        backend: the backend of the new modules, see `fused_attention`.
        skip_padded_queries: whether the new modules leave out padded queries, see `FusedMultiheadAttention`.

    Returns:
        The model. If the model itself is an `nn.MultiheadAttention`, the new module.

    Raises:
        TypeError: model is no module, or skip_padded_queries is no bool.
        ValueError: there is no backend of this name.
    """
    if not isinstance(model, nn.Module):
        raise checks.wrong_type("model", "a torch.nn.Module", model)
    check_backend(backend)
    checks.check_flag("skip_padded_queries", skip_padded_queries)
    if not any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        warnings.warn(
            f"convert_attention: {type(model).__name__} holds no torch.nn.MultiheadAttention, so nothing has changed. "
            "For a model of Hugging Face, see docs/huggingface.md.",
            stacklevel=2,
        )
    fused_already = [
        name or "the model"
        for name, module in model.named_modules()
        if isinstance(module, FusedMultiheadAttention)
        and (backend not in (None, module.backend) or (skip_padded_queries and not module.skip_padded_queries))
    ]
    if fused_already:
        warnings.warn(
            "convert_attention: backend and skip_padded_queries are for new modules. These are fused already, and have "
            f"attributes of the same names: {', '.join(fused_already)}",
            stacklevel=2,
        )
    fused = replace_attention(model, backend, skip_padded_queries)
    convert_layers(model)
    return fused.get(model, model)
