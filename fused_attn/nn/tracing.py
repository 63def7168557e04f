"""`torch.fx.symbolic_trace`: modules of ours are leaves of its graphs, as torch's own are."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy


def call_node(module: nn.Module, *args, **kwargs) -> Any:
    """The call of a module as one node of the graph that fx traces; None where its forward has to run.

    fx itself knows leaves by the package of their class, which is torch's. So it is here: a subclass may do something
    around our forward, which then is not all of the call. Nor is it where hooks have already run.
    """
    proxy = next((x for x in (*args, *kwargs.values()) if isinstance(x, Proxy)), None)
    is_ours = type(module).__module__.startswith("fused_attn.")
    if proxy is None or not is_ours or module._forward_pre_hooks or module._forward_hooks:
        return None
    tracer: Any = proxy.tracer
    path = tracer.path_of_module(module)
    # The graph's own module, at the path "", is no node of it.
    return tracer.create_proxy("call_module", path, args, kwargs) if path else None
