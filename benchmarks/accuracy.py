"""The error of a result against float64, and whether the result is wrong. What is wrong gets no time.

The formula in this file is dense attention, differentiated by autograd. The file uses two parts of `fused_attn`:
the rule that says which error is allowed, and the random numbers of dropout. A small case is checked as a whole. Of a
large case a sample of heads is checked; the gradients of a sampled head are exact, because every query and key of the
head is in the sample.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.inputs import DTYPES, Inputs
from fused_attn import tolerance
from fused_attn.attention import dropout

#: The sample of a large case has at most this many scores, in at most this many pairs of a batch entry and a KV head.
CHECKED_SCORES, CHECKED_PAIRS = 2**28, 64
#: A sample has at least this many pairs. With a bias, it has at least this many heads, each with all batch entries.
LEAST_PAIRS, LEAST_HEADS = 4, 3
#: Dropout with other random numbers may change the mean square of a result by this fraction. The mean square of the
#: output is 10 % too small if no probability is dropped, and 19 % too small if the survivors are not scaled. At
#: (4, 2, 64, 64), correct dropout changed no mean square by more than 2.3 % in twelve draws; larger samples vary less.
SQUARES_ALLOWED = 0.05


def allowed(yardstick: float, dtype: torch.dtype) -> float:
    """The largest error that is not wrong.

    Args:
        yardstick: the error of the plain formula, computed in `dtype`.

    The slack is wider than in the tests. Here each row is judged by its own size, so the rounding of one small row can
    decide, and every kernel rounds at other places.
    """
    return tolerance.allowed(yardstick, floor=4.0 * torch.finfo(dtype).eps, slack=2.0)


class Reference:
    """The results of a case in float64, and the largest error that is allowed.

    Results are compared row by row; a row is the last dimension of a tensor. The error of a row is its largest absolute
    difference divided by the size of the row. One size for a whole tensor would hide errors: with a causal mask the
    last rows, averages of many values, are far smaller than the first ones. The size of a row is the largest of

    - the largest entry of the row,
    - the largest entry of the tensor's median row,
    - for a gradient through the softmax, the root of the row in `_squares`. Where the terms of a gradient nearly
      cancel, the gradient keeps the rounding errors of the terms, which are far larger.

    allowed: the largest error that is not wrong, from the error of the same formula in the dtype of the case
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

    def error(
        self, results: dict[str, Tensor], ignores_padding: bool = False, has_other_dropout: bool = False
    ) -> float:
        """The largest error of all rows in the sample; infinite if any result has NaN or infinity anywhere.

        Args:
            results: "out", and gradients by the names of `Inputs.leaves`. The output alone is enough.
            ignores_padding: do not judge the rows of the output that belong to padding.
            has_other_dropout: dropout used other random numbers than those of `fused_attn`. Then the error is the
                largest relative difference of the mean square of a result, in the sample.
        """
        for name, x in results.items():
            if x.shape != self._shapes[name]:
                raise ValueError(f"{name}: expected shape {tuple(self._shapes[name])}, got {tuple(x.shape)}")
            if not torch.isfinite(x).all():
                return float("inf")
        sampled = {name: self._sampled(name, x.detach()) for name, x in results.items()}
        if has_other_dropout:
            squares = {name: x.double().square().mean().item() for name, x in sampled.items()}
            return max(abs(1.0 - x / self._truth[name].square().mean().item()) for name, x in squares.items())
        return self._error(sampled, ignores_padding)

    def is_right(self, error: float, has_other_dropout: bool = False) -> bool:
        # `allowed` is infinite where the formula overflows in the case's dtype. An infinite error is wrong even then.
        return error <= self.allowed_error(has_other_dropout) and math.isfinite(error)

    def allowed_error(self, has_other_dropout: bool = False) -> float:
        """The largest error that is not wrong, of results whose error `error` gives with the same argument."""
        return SQUARES_ALLOWED if has_other_dropout else self.allowed

    def _error(self, results: dict[str, Tensor], ignores_padding: bool = False) -> float:
        """`error` of results that hold the rows of the sample only."""
        worst = 0.0
        for name, x in results.items():
            errors = (x.to(torch.float64) - self._truth[name]).abs().amax(dim=-1) / self._sizes[name]
            if name == "out" and ignores_padding:
                errors = errors[self._is_valid(errors.device)]
            error = errors.max().item()
            worst = max(worst, error) if error == error else float("inf")
        return worst

    def _is_valid(self, device: torch.device) -> Tensor:
        """(sampled rows of the output,) bool: True where the query is no padding."""
        position = torch.arange(self.case.seqlen_q, device=device)
        group = self.case.heads // self.case.kv_heads
        return torch.cat([position < self.case.lengths[batch] for batch, _ in self._pairs for _ in range(group)])

    def _sampled(self, name: str, x: Tensor) -> Tensor:
        """The sampled rows of a whole tensor as (rows, columns), in the order of `_results`."""
        indices = dict.fromkeys(indices[name] for indices in self._indices() if name in indices)
        return torch.cat([torch.atleast_2d(self._part(x, index)) for index in indices])

    def _indices(self) -> list[dict[str, tuple[int, ...]]]:
        """For each query head in the sample, the leading indices of its part of every tensor, by name."""
        group = self.case.heads // self.case.kv_heads
        found = []
        for batch, kv_head in self._pairs:
            for head in range(group * kv_head, group * (kv_head + 1)):
                query, key = (batch, head), (batch, kv_head)
                bias = (head,) if self.case.mask == "relative-bias" else (0, head)
                keyed = {"key": key, "value": key, "bias": bias, "sinks": (head,)}
                found.append({"out": query, "query": query, **keyed})
        return found

    def _part(self, x: Tensor, index: tuple[int, ...]) -> Tensor:
        """One head of one sequence: (L, D), of a dense bias (L, S), of a relative bias (L + S - 1,), of sinks ()."""
        if self._bounds is None:
            return x[index]
        sequence, head = index
        return x[self._bounds[sequence] : self._bounds[sequence + 1], head]

    def _results(self, inputs: Inputs, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The sampled rows of the output and of all gradients, computed in `dtype`, as (rows, columns) by name.

        The second dictionary has the rows of `_squares`. It is empty unless `dtype` is float64.
        """
        wants_grad = self.case.direction != "forward"
        visible = inputs.visible()
        parts: dict[str, dict[tuple, Tensor]] = {}
        squares: dict[str, dict[tuple, Tensor]] = {}
        for indices in self._indices():
            leaves = {
                name: self._part(x.detach(), indices[name]).to(dtype).requires_grad_(wants_grad)
                for name, x in inputs.leaves.items()
            }
            factors = _dropout_factors(inputs, *indices["out"], dtype) if self.case.dropout_p else None
            out, probs = _dense(self.case, self._visible_of(visible, indices["out"][0]), factors, **leaves)
            _add(parts, indices, {"out": out.detach()})
            if wants_grad:
                dout = self._part(inputs.dout, indices["out"]).to(dtype)
                grads = torch.autograd.grad(out, list(leaves.values()), dout)
                _add(parts, indices, dict(zip(leaves, grads, strict=True)))
                if dtype == torch.float64:
                    _add(squares, indices, _squares(probs, dout, **leaves))
        return _as_rows(parts), _as_rows(squares)

    def _visible_of(self, visible: Tensor, batch: int) -> Tensor:
        """The (L, S) mask of one sequence."""
        length = self.case.lengths[batch]
        if self.case.is_packed:
            return visible[0, 0, :length, :length]
        return visible[min(batch, visible.shape[0] - 1), 0]


def sample(case: Case) -> list[tuple[int, int]]:
    """The pairs of a batch entry and a KV head that are checked: all pairs of a small case, and of a large case some,
    spread over batch entries and heads.

    A head with a bias or a sink comes with every batch entry, because the gradient is the sum over all of them.
    """
    scores = case.heads // case.kv_heads * case.seqlen_q * case.seqlen_k
    count = max(LEAST_PAIRS, min(CHECKED_PAIRS, CHECKED_SCORES // scores))
    if case.mask in ("bias", "relative-bias", "sinks"):
        count = min(case.kv_heads, max(LEAST_HEADS, count // case.batch))
        heads = torch.linspace(0, case.kv_heads - 1, count).round().int().tolist()
        return [(batch, head) for batch in range(case.batch) for head in heads]
    if case.batch * case.kv_heads <= count:
        return [(batch, head) for batch in range(case.batch) for head in range(case.kv_heads)]
    # From pair to pair the head advances by about the golden section of the number of heads, which spreads any number
    # of heads evenly. The stride has no common divisor with the number of heads, so every head has its turn.
    stride = max(1, round(0.618 * case.kv_heads))
    while math.gcd(stride, case.kv_heads) > 1:
        stride += 1
    return [(pair * case.batch // count, pair * stride % case.kv_heads) for pair in range(count)]


def _sizes(truth: Tensor) -> Tensor:
    """(rows,) the first two sizes of a row that `Reference` describes. Rows of zeros, which belong to keys that no
    query sees, do not count in the median."""
    sizes = truth.abs().amax(dim=-1)
    nonzero = sizes[sizes > 0]
    return sizes.clamp_min(nonzero.median() if len(nonzero) else 1e-30)


def _dense(
    case: Case, visible: Tensor, factors: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
    bias: Tensor | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output (L, D) and the probabilities (L, S) of one head, after dropout. Every query must see a key.

    factors: (L, S) by which dropout multiplies the probabilities, or None
    bias: (L, S); or (L + S - 1,), whose entry j - i + L - 1 belongs to query i and key j
    sinks: (), the logit of a further key, whose value is 0
    """
    scores = query @ key.mT * case.head_dim**-0.5
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    if bias is not None and bias.dim() == 1:
        rows, keys = scores.shape
        bias = bias.unfold(0, keys, 1)[:rows].flip(0)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.expand(len(scores), 1)], dim=-1)
    probs = torch.softmax(scores, dim=-1)[:, : len(key)]
    if factors is not None:
        probs = probs * factors
    return probs @ value, probs


def _dropout_factors(inputs: Inputs, batch: int, head: int, dtype: torch.dtype) -> Tensor:
    """(L, S), the factors by which dropout multiplies the probabilities of one head."""
    case = inputs.case
    row, group = (torch.arange(count, device=inputs.device) for count in (case.seqlen_q, -(-case.seqlen_k // 4)))
    counter = group, row[:, None], torch.full_like(row[:, None], head), torch.full_like(row[:, None], batch)
    numbers = dropout.numbers(counter, inputs.dropout_seed).flatten(1)[:, : case.seqlen_k]
    return (numbers >= dropout.threshold(case.dropout_p)).to(dtype) * dropout.scale(case.dropout_p)


@torch.no_grad()
def _squares(
    probs: Tensor, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """For the gradients of query, key, dense bias, sinks: the sums of the squares of their terms before cancellation.

    The terms are those of dscores = probs * (dprobs - delta), with dprobs in place of the difference. Where a query
    sees one key, the difference is exactly 0, and a kernel's result is the rounding error of dprobs. A sink has a term
    for each query: the probability of the sink times delta.
    """
    products = probs * (dout @ value.mT)
    terms = products.square()
    scale = query.shape[-1] ** -0.5
    squares = {"query": terms @ (scale * key).square(), "key": terms.mT @ (scale * query).square()}
    if sinks is not None:
        squares["sinks"] = ((1.0 - probs.sum(dim=-1)) * products.sum(dim=-1)).square().sum()
    return squares | ({"bias": terms} if bias is not None and bias.dim() == 2 else {})


def _add(sums: dict[str, dict[tuple, Tensor]], indices: dict[str, tuple], new: dict[str, Tensor]) -> None:
    """Adds tensors to the sums of the same name and index. Query heads of one group share a key, for example."""
    for name, x in new.items():
        found = sums.setdefault(name, {})
        found[indices[name]] = found[indices[name]] + x if indices[name] in found else x


def _as_rows(found: dict[str, dict[tuple, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([torch.atleast_2d(x) for x in parts.values()]) for name, parts in found.items()}
