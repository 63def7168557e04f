"""`num_heads` may be changed after construction, as in `torch.nn.MultiheadAttention`."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from fused_attn import FusedMultiheadAttention, TransformerEncoderLayer, convert_attention
from fused_attn.nn import CrossAttentionCache, StaticSelfAttentionCache

pytestmark = pytest.mark.quick

X, MEMORY = torch.randn(2, 3, 16), torch.randn(2, 5, 16)


def outputs(module: nn.Module, query: Tensor = X, key: Tensor = X) -> list[Tensor]:
    """The output with weights, without weights, and without gradients, where the native call may run."""
    found = [module(query, key, key)[0], module(query, key, key, need_weights=False)[0]]
    with torch.no_grad():
        return [*found, module(query, key, key, need_weights=False)[0]]


def changed_module() -> tuple[nn.MultiheadAttention, FusedMultiheadAttention]:
    """torch's module and ours with the same parameters, made with 4 heads and changed to 2."""
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    ours = FusedMultiheadAttention(16, 4, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    theirs.num_heads = ours.num_heads = 2
    return theirs, ours


@pytest.mark.parametrize("key", [X, MEMORY], ids=["self", "cross"])
def test_equals_torch(key: Tensor) -> None:
    theirs, ours = changed_module()
    expected = theirs(X, key, key)[0]
    for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), convert_attention(theirs)):
        assert module.head_dim == 8 and module.num_kv_heads == 2
        for found in outputs(module, X, X if key is X else key):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", [StaticSelfAttentionCache, CrossAttentionCache])
def test_steps_of_decoding(kind: type) -> None:
    _, ours = changed_module()
    is_self = kind is StaticSelfAttentionCache
    cache = StaticSelfAttentionCache(4) if is_self else CrossAttentionCache()
    key = X if is_self else MEMORY
    expected, _ = ours(X, key, key, need_weights=False, is_causal=is_self)
    with torch.no_grad():
        steps = [
            ours(row, *(row, row) if is_self else (key, key), need_weights=False, cache=cache)[0]
            for row in X.split(1, dim=1)
        ]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected)


def test_grouped_heads_keep_their_groups() -> None:
    """Keys have as many features as before, and each of their heads serves as many heads of queries."""
    module = FusedMultiheadAttention(16, 4, batch_first=True, num_kv_heads=2)
    module.num_heads = 2
    assert module.num_kv_heads == 1 and module.head_dim == 8
    first, *others = outputs(module)
    for found in others:
        torch.testing.assert_close(found, first)


@pytest.mark.parametrize("has_gradients", [True, False])
@pytest.mark.parametrize(
    ("options", "num_heads", "message"),
    [
        ({}, 3, "num_heads: expected a divisor of embed_dim=16, got 3"),
        ({}, 0, "num_heads: expected at least 1, got 0"),
        (
            {"num_kv_heads": 2},
            1,
            "num_heads: expected a multiple of 2, the number of heads for each head of keys, got 1",
        ),
        ({"rotary": True}, 2, r"x: expected head_dim=4 columns, got shape \(2, 3, 2, 8\)"),
    ],
)
def test_numbers_that_do_not_fit(options, num_heads: int, message: str, has_gradients: bool) -> None:
    module = FusedMultiheadAttention(16, 4, batch_first=True, **options)
    module.num_heads = num_heads
    with torch.set_grad_enabled(has_gradients), pytest.raises(ValueError, match=message):
        module(X, X, X, need_weights=False)


@pytest.mark.parametrize("x", [X, torch.randn(8, 1000, 16)], ids=["small", "large"])
@pytest.mark.parametrize("has_gradients", [True, False])
def test_a_number_that_does_not_fit_in_a_layer(has_gradients: bool, x: Tensor) -> None:
    layer = TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    layer.self_attn.num_heads = 3
    with torch.set_grad_enabled(has_gradients), pytest.raises(ValueError, match="num_heads: expected a divisor of"):
        layer(x)


def test_what_follows_from_num_heads_is_not_set_alone() -> None:
    module = FusedMultiheadAttention(16, 4)
    with pytest.raises(ValueError, match="head_dim: expected embed_dim // num_heads = 4, got 8"):
        module.head_dim = 8
    with pytest.raises(ValueError, match="num_kv_heads: expected 4, for which the projections were made, got 2"):
        module.num_kv_heads = 2
    module.num_heads, module.head_dim, module.num_kv_heads = 2, 8, 2


def test_a_module_that_was_pickled_with_these_attributes() -> None:
    module = FusedMultiheadAttention(16, 4, batch_first=True, num_kv_heads=2)
    state = {name: x for name, x in module.__dict__.items() if name != "_group_size"}
    old = FusedMultiheadAttention.__new__(FusedMultiheadAttention)
    old.__setstate__(state | {"head_dim": 4, "num_kv_heads": 2})
    assert old.num_kv_heads == 2 and old.head_dim == 4
    torch.testing.assert_close(outputs(old), outputs(module))
