"""The registered operators ``fused_attn::attention`` and ``fused_attn::attention_backward``.

`torch.compile`, `torch.export` and AOTInductor see these instead of the Python in between. Eager calls come here only
where somebody watches operators, see `fused_attn.modes`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fused_attn import dispatch, modes, profiling
from fused_attn.backends import reference
from fused_attn.backends.base import Backend, Gradients, Wanted, empty_like_layout, gradients
from fused_attn.masks import NO_MASK, MaskSpec
from fused_attn.problem import AttentionProblem, Band

# Everything of a problem that the tensors' own shapes do not tell.
_PROBLEM = (
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, float softcap, float dropout_p, "
    "SymInt band_left, SymInt band_right, SymInt band_offset, str backend"
)
_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor? seed, Tensor? bias, Tensor? relative_bias, "
    "Tensor? mask, Tensor? key_padding, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
)

_library = torch.library.Library("fused_attn", "DEF")
_library.define(f"attention({_INPUTS}, {_PROBLEM}) -> (Tensor out, Tensor lse)")
_library.define(
    f"attention_backward(bool[] wanted, Tensor? dout, Tensor? dlse, Tensor out, Tensor lse, {_INPUTS}, {_PROBLEM}) "
    "-> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dbias, Tensor drelative_bias, Tensor dsinks)"
)


def call(
    problem: AttentionProblem,
    backend: str | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    seed: Tensor | None,
    mask: MaskSpec,
) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling() and modes.in_functorch():
        return reference.forward(problem, query, key, value, sinks, seed, mask, True)  # operators have no such rules
    return torch.ops.fused_attn.attention(query, key, value, sinks, seed, *mask, *_scalars(problem), backend or "")


def call_backward(
    backend: Backend, problem: AttentionProblem, wanted: Wanted, dout: Tensor | None, dlse: Tensor | None,
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None, seed: Tensor | None,
    mask: MaskSpec,
) -> Gradients:  # fmt: skip
    """`gradients`, where somebody must see the operator."""
    if dout is None and dlse is None:
        return Gradients()
    grads = torch.ops.fused_attn.attention_backward(
        wanted, dout, dlse, out, lse, query, key, value, sinks, seed, *mask, *_scalars(problem), backend.name
    )
    return _only_wanted(grads, wanted)


def _scalars(problem: AttentionProblem) -> tuple[float, ...]:
    return (
        problem.seqlen_q, problem.seqlen_k, problem.scale, problem.softcap, problem.dropout_p, *problem.band
    )  # fmt: skip


def _only_wanted(grads: tuple[Tensor, ...], wanted: Wanted) -> Gradients:
    return Gradients(*(grad if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=True)))


@torch.library.impl(_library, "attention", "CompositeExplicitAutograd")
def _attention(query, key, value, sinks, seed, *rest):
    mask, problem, backend = _unpack(query, key, value, sinks, rest)
    chosen = profiling.named(dispatch.choose(problem, backend))
    return chosen.forward(problem, query, key, value, sinks, seed, mask, True)


@torch.library.register_fake("fused_attn::attention", lib=_library)
def _attention_fake(query, key, value, sinks, seed, *rest):
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return empty_like_layout(query, value.shape[3]), query.new_empty(query.shape[:3], dtype=lse_dtype)


@torch.library.impl(_library, "attention_backward", "CompositeExplicitAutograd")
def _attention_backward(wanted, dout, dlse, out, lse, query, key, value, sinks, seed, *rest):
    mask, problem, backend = _unpack(query, key, value, sinks, rest)
    grads = gradients(
        dispatch.choose(problem, backend), problem, Wanted(*wanted), dout, dlse,
        query, key, value, out, lse, sinks, seed, mask,
    )  # fmt: skip
    # An operator returns tensors, all of its own: absent gradients are empty ones.
    return tuple(query.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("fused_attn::attention_backward", lib=_library)
def _attention_backward_fake(wanted, dout, dlse, out, lse, query, key, value, sinks, seed, *rest):
    bias, relative_bias = rest[:2]
    shapes = (
        lambda: empty_like_layout(query, query.shape[3]),
        lambda: empty_like_layout(key, key.shape[3]),
        lambda: empty_like_layout(value, value.shape[3]),
        lambda: bias.new_empty(bias.shape),
        lambda: relative_bias.new_empty(relative_bias.shape),
        lambda: sinks.new_empty(sinks.shape),
    )
    return tuple(make() if is_wanted else query.new_empty(0) for make, is_wanted in zip(shapes, wanted, strict=True))


def _setup_context(ctx, inputs, output):
    query, key, value, sinks, seed, *rest = inputs
    ctx.save_for_backward(query, key, value, sinks, seed, *rest[:6], *output)
    ctx.scalars = rest[6:]
    ctx.set_materialize_grads(False)


def _attention_grads(ctx, dout, dlse):
    *tensors, out, lse = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = Wanted(*needs[:3], bias=needs[5], relative_bias=needs[6], sinks=needs[3])
    if dout is None and dlse is None:
        grads = Gradients()
    else:
        grads = torch.ops.fused_attn.attention_backward(wanted, dout, dlse, out, lse, *tensors, *ctx.scalars)
        grads = _only_wanted(grads, wanted)
    none = (None,) * (4 + len(ctx.scalars))
    return grads.query, grads.key, grads.value, grads.sinks, None, grads.bias, grads.relative_bias, *none


torch.library.register_autograd("fused_attn::attention", _attention_grads, setup_context=_setup_context, lib=_library)


def _setup_double_backward(ctx, inputs, output):
    wanted, dout, dlse, out, _, *tensors_and_scalars = inputs
    ctx.save_for_backward(torch.zeros_like(out) if dout is None else dout, dlse, *tensors_and_scalars[:11])
    ctx.wanted, ctx.scalars = wanted, tensors_and_scalars[11:]


def _double_backward(ctx, *ddgrads):
    """Second derivatives: those of the reference formula's gradients, recomputed with a graph.

    out and lse are functions of the other inputs, so nothing flows to them here.
    """
    dout, dlse, query, key, value, sinks, seed, *mask_tensors = ctx.saved_tensors
    tensors = (dout, dlse, query, key, value, sinks, *mask_tensors[:2])
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # The graph of this recomputation must not reach back into the caller's, unless that is to grow.
        leaves = [
            None if x is None
            else x.view_as(x) if create_graph and x.requires_grad
            else x.detach().requires_grad_()
            for x in tensors
        ]  # fmt: skip
        dout, dlse, query, key, value, sinks, bias, relative_bias = leaves
        mask, problem, _ = _unpack(query, key, value, sinks, (bias, relative_bias, *mask_tensors[2:], *ctx.scalars))
        grads = gradients(
            reference, problem, Wanted(*ctx.wanted), dout, dlse, query, key, value, None, None, sinks, seed, mask
        )
        pairs = [
            (g, dg)
            for g, dg in zip(grads, ddgrads, strict=True)
            if g is not None and dg is not None and g.requires_grad
        ]
        inputs = [x for x in leaves if x is not None]
        second = iter(
            torch.autograd.grad(
                [g for g, _ in pairs], inputs, [dg for _, dg in pairs], create_graph=create_graph, allow_unused=True
            )
            if pairs
            else [None] * len(inputs)
        )
    d_dout, d_dlse, dquery, dkey, dvalue, dsinks, dbias, drelative_bias = (
        None if x is None else next(second) for x in leaves
    )
    none = (None,) * (4 + len(ctx.scalars))
    return None, d_dout, d_dlse, None, None, dquery, dkey, dvalue, dsinks, None, dbias, drelative_bias, *none


torch.library.register_autograd(
    "fused_attn::attention_backward", _double_backward, setup_context=_setup_double_backward, lib=_library
)


profiling.register_flop_formulas()


def _unpack(query, key, value, sinks, rest) -> tuple[MaskSpec, AttentionProblem, str | None]:
    """The mask, the problem and the backend's name from the operator's arguments after ``seed``."""
    bias, relative_bias, mask, key_padding, cu_seqlens_q, cu_seqlens_k, *scalars, backend = rest
    problem = _problem(
        query.shape, key.shape, value.shape, query.dtype, query.device,
        None if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1,
        bias is not None, relative_bias is not None, mask is not None, key_padding is not None, sinks is not None,
        *scalars,
    )  # fmt: skip
    spec = NO_MASK if problem.is_plain else MaskSpec(bias, relative_bias, mask, key_padding, cu_seqlens_q, cu_seqlens_k)
    return spec, problem, backend or None


@functools.lru_cache(maxsize=4096)
def _problem(
    query, key, value, dtype, device, num_sequences,
    has_bias, has_relative_bias, has_mask, has_key_padding, has_sinks,
    max_seqlen_q, max_seqlen_k, scale, softcap, dropout_p, band_left, band_right, band_offset,
) -> AttentionProblem:  # fmt: skip
    return AttentionProblem(
        batch=query[0] if num_sequences is None else num_sequences,
        num_heads=query[1],
        num_kv_heads=key[1],
        seqlen_q=max_seqlen_q,
        seqlen_k=max_seqlen_k,
        head_dim=query[3],
        value_dim=value[3],
        dtype=dtype,
        device=device,
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
        band=Band(band_left, band_right, band_offset),
        is_packed=num_sequences is not None,
        has_mask=has_mask,
        has_key_padding=has_key_padding,
        has_bias=has_bias,
        has_relative_bias=has_relative_bias,
        has_sinks=has_sinks,
    )
