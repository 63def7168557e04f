"""The fused kernel under `torch.nn.functional.scaled_dot_product_attention` on a GPU, without a change to the caller.

    from fused_attn.integrations import sdpa
    sdpa.enable()

torch keeps a registry of flash attention implementations (``torch.nn.attention.list_flash_attention_impls``). Importing
this module adds "fused_attn" to the registry. `enable` activates the entry, and
``torch.nn.attention.restore_flash_attention_impl()`` undoes that.

torch calls the implementation only for calls that its own flash attention could take: on CUDA, in float16 or bfloat16,
without a mask other than ``is_causal``. So this way reaches no call with attn_mask, no float32 and no CPU. Masks,
windows, sinks and biases need `fused_attn.fused_attention`. `torch.nn.attention.varlen` keeps torch's kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library
from torch.nn import attention as torch_attention

from fused_attn import planning
from fused_attn.attention import checks, dropout
from fused_attn.attention.inputs import Inputs, Saved, Wanted
from fused_attn.attention.problem import AttentionProblem
from fused_attn.backends import events
from fused_attn.backends.base import Backend
from fused_attn.derivatives import gradients

#: The name in torch's registry.
NAME = "fused_attn"


def enable() -> None:
    """Puts the fused kernel under SDPA on CUDA, for the whole process.

    Raises:
        RuntimeError: torch sees no GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(
            "fused_attn.integrations.sdpa: expected a CUDA GPU, got none; SDPA on the CPU has no registry"
        )
    torch_attention.activate_flash_attention_impl(NAME)


class Registration:
    """The operators that SDPA calls, while they are replaced. ``remove`` gives torch's own kernels back.

    dispatch_key: the devices whose tensors get here, "CUDA"
    """

    def __init__(self, dispatch_key: str = "CUDA"):
        self._library: Library | None = Library("aten", "IMPL", dispatch_key)
        self._library.impl("_scaled_dot_product_flash_attention", _forward, dispatch_key)
        self._library.impl("_scaled_dot_product_flash_attention_backward", _backward, dispatch_key)

    def remove(self) -> None:
        """Gives torch's own kernels back."""
        if self._library is not None:
            self._library._destroy()
            self._library = None


def _forward(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
    return_debug_mask: bool = False, *, scale: float | None = None,
):  # fmt: skip
    """The operator ``aten::_scaled_dot_product_flash_attention``: query (B, H, L, D), key and value (B, Hkv, S, D).

    The state of the random generator, (2,) uint64, holds the seed of dropout. torch passes the state to `_backward`.
    """
    if return_debug_mask:
        raise checks.fail("return_debug_mask", "False, since the kernel never forms the mask", "True")
    seed = dropout.draw_seed(query.device) if dropout_p else torch.zeros((), dtype=torch.int64, device=query.device)
    problem, backend, inputs = _planned(query, key, value, dropout_p, is_causal, scale, seed)
    out, lse, _ = events.named(backend).forward(problem, inputs, True, False)
    state = torch.stack((seed, torch.zeros_like(seed))).view(torch.uint64)
    unused = torch.zeros((), dtype=torch.uint64, device=query.device)
    return out, lse, None, None, query.shape[2], key.shape[2], state, unused, query.new_empty(0)


def _backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, cum_seq_q: None,
    cum_seq_k: None, max_q: int, max_k: int, dropout_p: float, is_causal: bool, philox_seed: Tensor,
    philox_offset: Tensor, *, scale: float | None = None,
):  # fmt: skip
    """The operator ``aten::_scaled_dot_product_flash_attention_backward``. Returns the gradients of the first three."""
    seed = philox_seed.view(torch.int64)[0]
    problem, backend, inputs = _planned(query, key, value, dropout_p, is_causal, scale, seed)
    saved, wanted = Saved(out=out, lse=logsumexp, dout=grad_out), Wanted(query=True, key=True, value=True)
    grads = gradients.compute(backend, problem, inputs, saved, wanted)
    return grads.query, grads.key, grads.value


def _planned(query, key, value, dropout_p, is_causal, scale, seed) -> tuple[AttentionProblem, Backend, Inputs]:
    """The problem of a call of SDPA, the backend, and the tensors of the call."""
    has_groups = key.shape[1] != query.shape[1]
    plan = planning.plan(
        False, planning.tensors_of(query, key, value), (dropout_p, is_causal, scale, has_groups, None, 0.0), None
    )
    assert plan.layout is None and plan.backend is not None, "SDPA passes tensors (B, heads, rows, D)"
    return plan.problem, plan.backend, Inputs(query, key, value, seed=seed if dropout_p else None)


torch_attention.register_flash_attention_impl(NAME, register_fn=Registration)
