"""How far a result is from float64, and whether that is wrong. Correctness gates speed.

The formula here is dense attention in a few lines, differentiated by autograd; it uses nothing of `fused_attn`. Of
large cases it computes some heads only, of all batch entries, which is exact for every gradient of those heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.inputs import DTYPES, Inputs

#: Scores of a case beyond which only some heads are checked.
ALL_HEADS = 2**26
CHECKED_KV_HEADS = 2


class Reference:
    """float64 results of a case, and the error of the same formula in the case's own dtype as the yardstick.

    allowed: the largest relative error that is not wrong. Twice the yardstick's, because kernels round at other places,
    and four units of the dtype, because the yardstick may be exact by chance.
    """

    def __init__(self, inputs: Inputs) -> None:
        case = inputs.case
        self.case = case
        scores = case.batch * case.heads * case.seqlen_q * case.length
        self._kv_heads = list(range(case.kv_heads))
        if scores > ALL_HEADS and case.kv_heads > CHECKED_KV_HEADS:
            self._kv_heads = [0, case.kv_heads - 1][:CHECKED_KV_HEADS]
        group = case.heads // case.kv_heads
        self._heads = [group * head + member for head in self._kv_heads for member in range(group)]
        self._truth = self._results(inputs, torch.float64)
        self.allowed = 2.0 * self.error(self._results(inputs, DTYPES[case.dtype]), is_cut=True)
        self.allowed += 4.0 * torch.finfo(DTYPES[case.dtype]).eps

    def error(self, results: dict[str, Tensor], is_cut: bool = False) -> float:
        """Largest error of any result, relative to the largest entry of that tensor; NaN is infinitely wrong.

        Args:
            results: by name; those of the forward pass alone are enough.
            is_cut: they hold the checked heads only.
        """
        worst = 0.0
        for name, x in results.items():
            if not is_cut:
                if not torch.isfinite(x).all():  # in any head, also those that are not checked further
                    return float("inf")
                x = self._cut(name, x.detach())
            truth = self._truth[name]
            if x.shape != truth.shape:
                raise ValueError(f"{name}: expected shape {tuple(truth.shape)}, got {tuple(x.shape)}")
            error = (x.to(torch.float64) - truth).abs().max().item() / max(truth.abs().max().item(), 1e-30)
            worst = max(worst, error) if error == error else float("inf")
        return worst

    def is_right(self, error: float) -> bool:
        # A yardstick that is itself infinitely wrong allows nothing.
        return error <= self.allowed and math.isfinite(error)

    def _cut(self, name: str, x: Tensor) -> Tensor:
        """The checked heads of a whole result."""
        heads = self._kv_heads if name in ("key", "value") else self._heads
        if len(heads) == (self.case.kv_heads if name in ("key", "value") else self.case.heads):
            return x
        dim = 0 if name == "bias" and self.case.mask == "relative-bias" else 1
        return x.index_select(dim, torch.tensor(heads, device=x.device))

    def _results(self, inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
        """Checked heads of out and of all gradients, computed in `dtype`."""
        case = inputs.case
        wants_grad = case.direction != "forward"
        leaves = {name: self._cut(name, x.detach()).to(dtype) for name, x in inputs.leaves.items()}
        dout = self._cut("out", inputs.dout).to(dtype)
        results = {"out": torch.empty_like(leaves["query"])}
        if wants_grad:
            results |= {name: torch.zeros_like(x) for name, x in leaves.items()}
        group = case.heads // case.kv_heads
        visible = inputs.visible()
        for batch in range(case.batch):
            seen = self._of_sequence(visible, batch)
            for head in range(len(self._heads)):
                places = self._places(inputs, batch, head, head // group)
                parts = {name: leaves[name][index] for name, index in places.items() if name in leaves}
                if wants_grad:
                    parts = {name: x.detach().requires_grad_() for name, x in parts.items()}
                out = _dense(seen, case.head_dim, **parts)
                results["out"][places["query"]] = out.detach()
                if wants_grad:
                    grads = torch.autograd.grad(out, list(parts.values()), dout[places["query"]])
                    for name, grad in zip(parts, grads, strict=True):
                        results[name][places[name]] += grad
        return results

    def _of_sequence(self, visible: Tensor, batch: int) -> Tensor:
        length = self.case.lengths[batch]
        if self.case.is_packed:
            return visible[0, 0, :length, :length]
        return visible[min(batch, visible.shape[0] - 1), 0]

    def _places(self, inputs: Inputs, batch: int, head: int, kv_head: int) -> dict[str, tuple]:
        """Where one sequence and one head of the checked ones is in each tensor."""
        if self.case.is_packed:
            start, end = inputs.cu_seqlens[batch : batch + 2].tolist()
            query, key = (slice(start, end), head), (slice(start, end), kv_head)
        else:
            query, key = (batch, head), (batch, kv_head)
        bias = (head,) if self.case.mask == "relative-bias" else (0, head)
        return {"query": query, "key": key, "value": key, "bias": bias}


def _dense(visible: Tensor, head_dim: int, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None):
    """(L, D). bias: (L, S), or (L + S - 1,), whose entry j - i + L - 1 belongs to score (i, j)."""
    scores = query @ key.mT * head_dim**-0.5
    if bias is not None and bias.dim() == 1:
        rows, keys = scores.shape
        bias = bias.unfold(0, keys, 1)[:rows].flip(0)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~visible, float("-inf"))
    # Every query of the case list sees a key, so no row is empty.
    return torch.softmax(scores, dim=-1) @ value
