"""Replaces the attention modules of a model by those of the fused kernel."""

from __future__ import annotations

import warnings

from torch import nn

from fused_attn.nn.attention import FusedMultiheadAttention


def replace_attention(
    model: nn.Module, backend: str | None, skip_padded_queries: bool = False
) -> dict[nn.Module, FusedMultiheadAttention]:
    """Replaces each `nn.MultiheadAttention` in a model, in place. Returns a dict from torch's module to the new one.

    The function warns of the modules that it leaves alone. The layers around the attention keep their classes.
    """
    fused: dict[nn.Module, FusedMultiheadAttention] = {}  # one module may be registered in several places
    left_alone = []
    # torch.compile(attention) has a parent that calls the old module, whatever takes its place among the children. The
    # class has no public name, and to import it takes seconds.
    callers = [module for module in model.modules() if type(module).__module__.startswith("torch._dynamo")]
    compiled = {child for caller in callers for child in caller.children()}
    for name, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention) or isinstance(module, FusedMultiheadAttention):
            continue
        if type(module) is not nn.MultiheadAttention or "forward" in vars(module) or module in compiled:
            left_alone.append(f"{name or 'the model'} ({type(module).__name__})")
        else:
            fused[module] = FusedMultiheadAttention.from_torch(module, backend, skip_padded_queries=skip_padded_queries)
    if left_alone:
        warnings.warn(
            "convert_attention: left alone, because they are of a subclass, parametrised, compiled by torch.compile or "
            "with a forward of their own: " + ", ".join(left_alone),
            stacklevel=3,
        )
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in fused:
                parent._modules[name] = fused[child]
    return fused
