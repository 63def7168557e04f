"""Keeps torch's encoder layer from its fast path, which would not call a fused self-attention."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from fused_attn.nn.attention import FusedMultiheadAttention


def keep_fast_path_off(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Makes torch's encoder layer call a fused self-attention in inference, too.

    torch calls this function whenever a module, `child`, is registered in another one, `parent`, under `name`.

    The encoder layer has a fast path, which computes plain attention from the parameters of ``self_attn`` and does not
    call ``self_attn``. torch leaves the fast path if the layer has a hook. So the layer gets a hook that does nothing.
    """
    if (
        name == "self_attn"
        and isinstance(parent, nn.TransformerEncoderLayer)
        and not hasattr(type(parent), "takes_is_causal")  # our own layer has no fast path
        and child is not None
        and any(isinstance(module, FusedMultiheadAttention) for module in child.modules())
        and _nothing not in parent._forward_pre_hooks.values()
    ):
        parent.register_forward_pre_hook(_nothing)


def _nothing(module: nn.Module, inputs: tuple) -> None:
    """The forward pre-hook that `keep_fast_path_off` registers. torch looks only whether there is a hook."""


# The hook sees every way of replacing the attention: an assignment, the constructor of a subclass, a tool.
register_module_module_registration_hook(keep_fast_path_off)
