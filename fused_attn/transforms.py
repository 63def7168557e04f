"""Which of torch's modes surround a call."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

# Private names, the only ones that answer in 50 ns. Their absence must not break an import, nor a result.
_are_functorch_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_is_any_autocast_enabled = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def are_active() -> bool:
    """True inside `torch.func` transforms and forward-mode AD, which see through PyTorch code but not into kernels."""
    return getattr(forward_ad, "_current_level", -1) >= 0 or _are_functorch_transforms_active()


def is_autocasting() -> bool:
    """True when autocast may be on for some device; under compilation always, since the trace must ask precisely."""
    return torch.compiler.is_compiling() or _is_any_autocast_enabled()
