"""Support for `torch.fx.symbolic_trace`: the modules of this library are leaves of a graph, as torch's modules are."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy


def call_node(module: nn.Module, *args, **kwargs) -> Any:
    """The call of a module as one node of the graph that fx traces, or None if the forward of the module has to run.

    fx decides by the package of a module's class: classes of torch are leaves. This function decides in the same way:
    classes of this library are leaves. Two kinds of modules are no leaves, because the forward of this library is not
    the whole of their call: subclasses elsewhere, and modules with hooks.
    """
    proxy = next((x for x in (*args, *kwargs.values()) if isinstance(x, Proxy)), None)
    is_ours = type(module).__module__.startswith("fused_attn.")
    if proxy is None or not is_ours or module._forward_pre_hooks or module._forward_hooks:
        return None
    tracer: Any = proxy.tracer
    path = tracer.path_of_module(module)
    # The path "" belongs to the module of the whole graph, which is no node.
    return tracer.create_proxy("call_module", path, args, kwargs) if path else None
