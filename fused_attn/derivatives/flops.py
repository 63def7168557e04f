"""How many floating-point operations `FlopCounterMode` counts for the registered operators."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from fused_attn.attention.inputs import Inputs, Saved, Wanted, take
from fused_attn.attention.problem import Scalars


def forward_flops(*arguments, out_val=None) -> int:
    """Of ``fused_attn::attention``: both products, a multiply-add being two."""
    inputs, others = take(Inputs, arguments)
    scalars, _ = take(Scalars, others)
    return 2 * _visible_scores(inputs, scalars) * (inputs.query.shape[3] + inputs.value.shape[3])


def backward_flops(*arguments, out_val=None) -> int:
    """Of ``fused_attn::attention_backward``: scores and their gradients, and a product for each wanted gradient."""
    inputs, others = take(Inputs, arguments)
    _, (wanted, *numbers) = take(Saved, others)
    scalars, _ = take(Scalars, numbers)
    wanted = Wanted(*wanted)
    head_dim, value_dim = inputs.query.shape[3], inputs.value.shape[3]
    columns = head_dim * (1 + wanted.query + wanted.key) + value_dim * wanted.value
    if any(wanted._replace(value=False)):
        columns += value_dim
    return 2 * _visible_scores(inputs, scalars) * columns


def _visible_scores(inputs: Inputs, scalars: Scalars) -> int:
    """Of all heads, inside the band. What other masks hide depends on their contents, and counts."""
    query, key = inputs.query, inputs.key
    lengths: Iterable[tuple[int, int]]
    if inputs.cu_seqlens_q is None or inputs.cu_seqlens_k is None:
        lengths = [(query.shape[2], key.shape[2])] * query.shape[0]
    else:
        lengths = zip(
            _lengths(inputs.cu_seqlens_q, scalars.max_seqlen_q),
            _lengths(inputs.cu_seqlens_k, scalars.max_seqlen_k),
            strict=True,
        )
    band = scalars.band_left, scalars.band_right, scalars.band_offset
    return query.shape[1] * sum(_scores_in_band(*sizes, *band) for sizes in lengths)


def _lengths(cu_seqlens: Tensor, longest: int) -> list[int]:
    """Of packed sequences; of those that have no contents (meta and fake tensors) the longest that they may be."""
    if type(cu_seqlens) is not Tensor or cu_seqlens.is_meta:
        return [longest] * (cu_seqlens.shape[0] - 1)
    return cu_seqlens.diff().tolist()


@functools.lru_cache(maxsize=4096)
def _scores_in_band(seqlen_q: int, seqlen_k: int, left: int, right: int, offset: int) -> int:
    if left < 0 and right < 0:
        return seqlen_q * seqlen_k
    diagonal = torch.arange(seqlen_q) + offset
    first = torch.zeros_like(diagonal) if left < 0 else (diagonal - left).clamp(0, seqlen_k)
    end = torch.full_like(diagonal, seqlen_k) if right < 0 else (diagonal + right + 1).clamp(0, seqlen_k)
    return int((end - first).clamp(min=0).sum())


class _Registrar(importlib.abc.MetaPathFinder):
    """Registers the formulas when somebody imports torch's counter, which takes half a second, as it imports Triton."""

    MODULE = "torch.utils.flop_counter"

    def find_spec(self, name: str, path=None, target=None):
        if name != self.MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None, "torch has the module"
        execute = spec.loader.exec_module

        def execute_and_register(module) -> None:
            execute(module)
            self.register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]  # of this one loader
        return spec

    @staticmethod
    def register(module) -> None:
        operators = torch.ops.fused_attn
        module.register_flop_formula(operators.attention, get_raw=True)(forward_flops)
        module.register_flop_formula(operators.attention_backward, get_raw=True)(backward_flops)

    @classmethod
    def install(cls) -> None:
        """To be called when the operators are there."""
        if cls.MODULE in sys.modules:
            cls.register(sys.modules[cls.MODULE])
        else:
            sys.meta_path.insert(0, cls())


register_flop_formulas = _Registrar.install
