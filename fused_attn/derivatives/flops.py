"""The numbers of floating-point operations that torch's `FlopCounterMode` counts for the registered operators.

Only matrix products count, and a multiply-add counts as two operations, as torch counts its own operators.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from fused_attn.attention.inputs import Inputs, Saved, Wanted, shapes_of, take
from fused_attn.attention.problem import Scalars, lengths_of


def forward_flops(*arguments, out_val=None) -> int:
    """The operations of ``fused_attn::attention``: the products query @ key^T and probs @ value.

    The arguments are those of the operator.
    """
    inputs, others = take(Inputs, arguments)
    scalars, _ = take(Scalars, others)
    return 2 * _visible_scores(inputs, scalars) * (inputs.query.shape[-1] + inputs.value.shape[-1])


def backward_flops(*arguments, out_val=None) -> int:
    """The operations of ``fused_attn::attention_backward``, whose arguments this function takes.

    The products are the scores, the gradient of the probs (dout @ value^T) unless only the gradient of the value is
    wanted, and one product for each wanted gradient of query, key and value.
    """
    inputs, others = take(Inputs, arguments)
    _, (wanted, *numbers) = take(Saved, others)
    scalars, _ = take(Scalars, numbers)
    wanted = Wanted(*wanted)
    head_dim, value_dim = inputs.query.shape[-1], inputs.value.shape[-1]
    columns = head_dim * (1 + wanted.query + wanted.key) + value_dim * wanted.value
    if any(wanted._replace(value=False)):
        columns += value_dim
    return 2 * _visible_scores(inputs, scalars) * columns


def _visible_scores(inputs: Inputs, scalars: Scalars) -> int:
    """The number of scores inside the band, over all heads and sequences.

    Scores that other masks hide, and those of keys behind the length of their batch entry, count as visible, because
    the shapes alone do not tell how many are hidden.
    """
    query = inputs.query
    longest_q, longest_k = lengths_of(shapes_of(inputs), scalars)
    lengths: Iterable[tuple[int, int]]
    if inputs.cu_seqlens_q is None:
        lengths = [(longest_q, longest_k)] * query.shape[0]
    elif inputs.cu_seqlens_k is None:
        lengths = [(rows, longest_k) for rows in _lengths(inputs.cu_seqlens_q, longest_q)]
    else:
        lengths = zip(_lengths(inputs.cu_seqlens_q, longest_q), _lengths(inputs.cu_seqlens_k, longest_k), strict=True)

    def visible(seqlen_q: int, seqlen_k: int) -> int:
        """The number of scores of one head of one sequence that the band shows."""
        from_end = seqlen_k - seqlen_q if scalars.band_from_end else 0
        offset = scalars.band_offset + from_end
        return _scores_in_band(seqlen_q, seqlen_k, scalars.band_left, scalars.band_right, offset)

    return query.shape[1] * sum(visible(*sizes) for sizes in lengths)


def _lengths(cu_seqlens: Tensor, longest: int) -> list[int]:
    """The length of each packed sequence. Meta and fake tensors have no contents, so there each length is `longest`."""
    if type(cu_seqlens) is not Tensor or cu_seqlens.is_meta:
        return [longest] * (cu_seqlens.shape[0] - 1)
    return cu_seqlens.diff().tolist()


@functools.lru_cache(maxsize=4096)
def _scores_in_band(seqlen_q: int, seqlen_k: int, left: int, right: int, offset: int) -> int:
    """The number of scores of one head and one sequence inside a `Band`."""
    if left < 0 and right < 0:
        return seqlen_q * seqlen_k
    diagonal = torch.arange(seqlen_q) + offset
    first = torch.zeros_like(diagonal) if left < 0 else (diagonal - left).clamp(0, seqlen_k)
    end = torch.full_like(diagonal, seqlen_k) if right < 0 else (diagonal + right + 1).clamp(0, seqlen_k)
    return int((end - first).clamp(min=0).sum())


class _Registrar(importlib.abc.MetaPathFinder):
    """An import hook that registers the formulas as soon as a program imports torch's FLOP counter.

    The hook does not import the counter itself, because that imports Triton, which takes half a second.
    """

    MODULE = "torch.utils.flop_counter"

    def find_spec(self, name: str, path=None, target=None):
        """The spec of `MODULE`, whose loader also registers the formulas; None for every other module."""
        if name != self.MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None, "torch contains the module"
        execute = spec.loader.exec_module

        def execute_and_register(module) -> None:
            """Executes the code of the imported module, then registers the formulas with it."""
            execute(module)
            self.register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]  # changes this loader alone
        return spec

    @staticmethod
    def register(module) -> None:
        """Registers both formulas with torch's counter, the imported `MODULE`."""
        operators = torch.ops.fused_attn
        module.register_flop_formula(operators.attention, get_raw=True)(forward_flops)
        module.register_flop_formula(operators.attention_backward, get_raw=True)(backward_flops)

    @classmethod
    def install(cls) -> None:
        """Registers the formulas now if the counter is imported already. Otherwise installs the hook.

        The operators must be registered before this call.
        """
        if cls.MODULE in sys.modules:
            cls.register(sys.modules[cls.MODULE])
        else:
            sys.meta_path.insert(0, cls())


register_flop_formulas = _Registrar.install
