"""How far a result is from float64, and whether that is wrong. Correctness gates speed.

The formula here is dense attention in a few lines, differentiated by autograd. Of `fused_attn` it uses nothing but the
rule that says what error is allowed. Of
large cases it computes a sample, spread over batch entries and heads, which is exact for every gradient in it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.inputs import DTYPES, Inputs
from fused_attn import tolerance

#: Of a larger case, at most so many scores are checked, of at most so many pairs of a batch entry and a key/value head.
CHECKED_SCORES, CHECKED_PAIRS = 2**28, 64
#: At least so many pairs are checked. Where batch entries share a bias, so many heads of all batch entries are.
LEAST_PAIRS, LEAST_HEADS = 4, 3


def allowed(yardstick: float, dtype: torch.dtype) -> float:
    """The largest error that is not wrong, where the plain formula in the same dtype has the error `yardstick`.

    The slack is wider than in tests, because errors here are relative to their own row: one small row decides, and
    kernels round it at other places.
    """
    return tolerance.allowed(yardstick, floor=4.0 * torch.finfo(dtype).eps, slack=2.0)


class Reference:
    """float64 results of a case, and the error of the same formula in the case's own dtype as the yardstick.

    A row (the last dimension of a tensor) is judged by its own size, because the late rows of a causal mask, averages
    of many values, are far smaller than the first. Its size is its largest entry; but that of the tensor's median row
    if it is smaller, and of a gradient through the softmax what its terms come to without cancellation (`_squares`),
    because what nearly cancels keeps the rounding of the larger numbers that it came from.

    allowed: the largest relative error that is not wrong
    """

    def __init__(self, inputs: Inputs) -> None:
        case = inputs.case
        self.case = case
        self._shapes = {"out": inputs.dout.shape} | {name: x.shape for name, x in inputs.leaves.items()}
        self._bounds = inputs.cu_seqlens.tolist() if case.is_packed else None
        self._pairs = sample(case)
        self._truth, squares = self._results(inputs, torch.float64)
        self._sizes = {name: _sizes(x) for name, x in self._truth.items()}
        for name, x in squares.items():
            self._sizes[name] = self._sizes[name].maximum(x.amax(dim=-1).sqrt())
        dtype = DTYPES[case.dtype]
        self.allowed = allowed(self._error(self._results(inputs, dtype)[0]), dtype)

    def error(self, results: dict[str, Tensor], ignores_padding: bool = False) -> float:
        """The largest error of any row of any result, relative to that row. The error of NaN is infinite.

        Args:
            results: by name; those of the forward pass alone are enough.
            ignores_padding: rows of the output that belong to padding may hold anything finite.
        """
        for name, x in results.items():
            if x.shape != self._shapes[name]:
                raise ValueError(f"{name}: expected shape {tuple(self._shapes[name])}, got {tuple(x.shape)}")
            if not torch.isfinite(x).all():  # anywhere, also in what is not checked further
                return float("inf")
        return self._error({name: self._checked(name, x.detach()) for name, x in results.items()}, ignores_padding)

    def is_right(self, error: float) -> bool:
        # A yardstick with an infinite error allows nothing.
        return error <= self.allowed and math.isfinite(error)

    def _error(self, results: dict[str, Tensor], ignores_padding: bool = False) -> float:
        """results: only the rows of the checked parts."""
        worst = 0.0
        for name, x in results.items():
            errors = (x.to(torch.float64) - self._truth[name]).abs().amax(dim=-1) / self._sizes[name]
            if name == "out" and ignores_padding:
                errors = errors[self._is_real(errors.device)]
            error = errors.max().item()
            worst = max(worst, error) if error == error else float("inf")
        return worst

    def _is_real(self, device: torch.device) -> Tensor:
        """(checked rows of the output,) bool: True where the token is no padding."""
        position = torch.arange(self.case.seqlen_q, device=device)
        group = self.case.heads // self.case.kv_heads
        return torch.cat([position < self.case.lengths[batch] for batch, _ in self._pairs for _ in range(group)])

    def _checked(self, name: str, x: Tensor) -> Tensor:
        """The checked parts of a whole tensor as (rows, columns), in the order of `_results`."""
        places = dict.fromkeys(places[name] for places in self._places() if name in places)
        return torch.cat([torch.atleast_2d(self._part(x, place)) for place in places])

    def _places(self) -> list[dict[str, tuple[int, ...]]]:
        """For each checked query head of each checked batch entry, its indices in every tensor."""
        group = self.case.heads // self.case.kv_heads
        found = []
        for batch, kv_head in self._pairs:
            for head in range(group * kv_head, group * (kv_head + 1)):
                query, key = (batch, head), (batch, kv_head)
                bias = (head,) if self.case.mask == "relative-bias" else (0, head)
                found.append({"out": query, "query": query, "key": key, "value": key, "bias": bias})
        return found

    def _part(self, x: Tensor, place: tuple[int, ...]) -> Tensor:
        """The part of one batch entry and head: (L, D), of a dense bias (L, S), of a relative one (L + S - 1,)."""
        if self._bounds is None:
            return x[place]
        sequence, head = place
        return x[self._bounds[sequence] : self._bounds[sequence + 1], head]

    def _results(self, inputs: Inputs, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Two dictionaries by name. The first has the checked parts of out and of all gradients as (rows, columns),
        computed in `dtype`. The second has the sums of `_squares`, and is empty unless `dtype` is float64."""
        wants_grad = self.case.direction != "forward"
        visible = inputs.visible()
        parts: dict[str, dict[tuple, Tensor]] = {}
        squares: dict[str, dict[tuple, Tensor]] = {}
        for places in self._places():
            leaves = {
                name: self._part(x.detach(), places[name]).to(dtype).requires_grad_(wants_grad)
                for name, x in inputs.leaves.items()
            }
            out, weights = _dense(self._of_sequence(visible, places["out"][0]), self.case.head_dim, **leaves)
            _add(parts, places, {"out": out.detach()})
            if wants_grad:
                dout = self._part(inputs.dout, places["out"]).to(dtype)
                grads = torch.autograd.grad(out, list(leaves.values()), dout)
                _add(parts, places, dict(zip(leaves, grads, strict=True)))
                if dtype == torch.float64:
                    _add(squares, places, _squares(weights, dout, **leaves))
        return _as_rows(parts), _as_rows(squares)

    def _of_sequence(self, visible: Tensor, batch: int) -> Tensor:
        length = self.case.lengths[batch]
        if self.case.is_packed:
            return visible[0, 0, :length, :length]
        return visible[min(batch, visible.shape[0] - 1), 0]


def sample(case: Case) -> list[tuple[int, int]]:
    """Pairs of a batch entry and a key/value head: all of a small case, of a larger one some, spread over both.

    A head with a bias comes with every batch entry, because its gradient is their sum.
    """
    scores = case.heads // case.kv_heads * case.seqlen_q * case.length
    count = max(LEAST_PAIRS, min(CHECKED_PAIRS, CHECKED_SCORES // scores))
    if case.mask in ("bias", "relative-bias"):
        heads = _spread(case.kv_heads, max(LEAST_HEADS, count // case.batch))
        return [(batch, head) for batch in range(case.batch) for head in heads]
    if case.batch * case.kv_heads <= count:
        return [(batch, head) for batch in range(case.batch) for head in range(case.kv_heads)]
    # The head moves on by the golden section of their number, or a little more, so that every head has its turn.
    stride = max(1, round(0.618 * case.kv_heads))
    stride += next(more for more in range(case.kv_heads) if math.gcd(stride + more, case.kv_heads) == 1)
    batches = [pair * case.batch // count for pair in range(count)]
    return [(batch, pair * stride % case.kv_heads) for pair, batch in enumerate(batches)]


def _spread(total: int, count: int) -> list[int]:
    """`count` numbers of range(total) at even distances, with the first and the last; all if there are fewer."""
    if total <= count:
        return list(range(total))
    return [round(step * (total - 1) / (count - 1)) for step in range(count)]


def _sizes(truth: Tensor) -> Tensor:
    """(rows,) sizes that errors are relative to. Rows of zeros (of masked keys) do not count in the median."""
    sizes = truth.abs().amax(dim=-1)
    visible = sizes[sizes > 0]
    return sizes.clamp_min(visible.median() if len(visible) else 1e-30)


def _dense(
    visible: Tensor, head_dim: int, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output (L, D) and weights (L, S).

    bias: (L, S), or (L + S - 1,), whose entry j - i + L - 1 belongs to score (i, j)
    """
    scores = query @ key.mT * head_dim**-0.5
    if bias is not None and bias.dim() == 1:
        rows, keys = scores.shape
        bias = bias.unfold(0, keys, 1)[:rows].flip(0)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~visible, float("-inf"))
    # Every query of the case list sees a key, so no row is empty.
    weights = torch.softmax(scores, dim=-1)
    return weights @ value, weights


@torch.no_grad()
def _squares(
    weights: Tensor, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None
) -> dict[str, Tensor]:
    """For the gradients of query, key and dense bias, the sums of the squares of their terms, with dP for dP - delta.

    Where a query sees one key, that difference is 0, and a kernel's result is the rounding error of dP.
    """
    terms = (weights * (dout @ value.mT)).square()
    scale = query.shape[-1] ** -0.5
    squares = {"query": terms @ (scale * key).square(), "key": terms.mT @ (scale * query).square()}
    return squares | ({"bias": terms} if bias is not None and bias.dim() == 2 else {})


def _add(sums: dict[str, dict[tuple, Tensor]], places: dict[str, tuple], new: dict[str, Tensor]) -> None:
    """Adds `new` to what was found before for the same place of each tensor."""
    for name, x in new.items():
        found = sums.setdefault(name, {})
        found[places[name]] = found[places[name]] + x if places[name] in found else x


def _as_rows(found: dict[str, dict[tuple, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([torch.atleast_2d(x) for x in parts.values()]) for name, parts in found.items()}
