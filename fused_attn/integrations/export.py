"""Exported programs that run without fused_attn: in ONNX runtimes, or from a package of AOTInductor without Python.

>>> import torch
>>> from fused_attn import FusedMultiheadAttention
>>> from fused_attn.integrations.export import decompose
>>> class Model(torch.nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.attention = FusedMultiheadAttention(64, 4, batch_first=True)
...     def forward(self, x):
...         return self.attention(x, x, x, need_weights=False, is_causal=True)[0]
>>> program = decompose(torch.export.export(Model().eval(), (torch.randn(2, 10, 64),)))
>>> any("fused_attn" in str(node.target) for node in program.graph.nodes)
False

With the packages onnx and onnxscript, ``torch.onnx.export(program, dynamo=True).save("model.onnx")`` writes a file.
"""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from fused_attn.derivatives import ops


def decompose(program: ExportedProgram) -> ExportedProgram:
    """The program with operators of torch in the place of fused attention: the reference formula, which stores scores.

    Args:
        program: what `torch.export.export` has made of a model in eval mode. Its shapes may be dynamic.

    Returns:
        A new program, which takes and returns the same tensors. It needs O(L * S) memory for each head.

    Raises:
        TypeError: program is no `torch.export.ExportedProgram`.
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(f"program: expected a torch.export.ExportedProgram, got {type(program).__name__}")
    return program.run_decompositions({torch.ops.fused_attn.attention.default: ops.by_formula})
