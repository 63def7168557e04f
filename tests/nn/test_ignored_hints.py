"""Layers may ignore the hint is_causal, as torch allows. Such layers need the causal mask itself."""

from __future__ import annotations

import functools
import subprocess
import sys
import types
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import fused_attn
from fused_attn import FusedMultiheadAttention, KVCache, TransformerDecoder, TransformerEncoder

pytestmark = pytest.mark.quick

SIZES = (16, 2, 32, 0.0)
CAUSAL = torch.ones(6, 6, dtype=torch.bool).triu(1)
IS_PADDING = torch.arange(6) >= torch.tensor([[6], [5]])


def block_without_hint(self, x: Tensor, attn_mask, key_padding_mask, is_causal=False) -> Tensor:
    masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
    return self.dropout1(self.self_attn(x, x, x, need_weights=False, **masks)[0])


class EncoderLayer(fused_attn.TransformerEncoderLayer):
    _sa_block = block_without_hint


class DecoderLayer(fused_attn.TransformerDecoderLayer):
    _sa_block = block_without_hint


class WholeEncoderLayer(fused_attn.TransformerEncoderLayer):
    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        return self.norm1(src + self._sa_block(src, src_mask, src_key_padding_mask))


class Attention(FusedMultiheadAttention):
    def forward(self, *args, is_causal=False, **options):
        return super().forward(*args, **options)


def with_instance_block() -> nn.Module:
    layer = nn.TransformerEncoderLayer(*SIZES, batch_first=True)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for layer in stack.layers:
        layer._sa_block = types.MethodType(block_without_hint, layer)
    return fused_attn.convert_attention(stack)


def with_attention_without_hint() -> nn.Module:
    layer = fused_attn.TransformerEncoderLayer(*SIZES, batch_first=True)
    layer.self_attn = Attention(*SIZES[:2], batch_first=True)
    return TransformerEncoder(layer, 2)


def with_forward_of_an_instance() -> nn.Module:
    stack = TransformerEncoder(fused_attn.TransformerEncoderLayer(*SIZES, batch_first=True), 2)
    for layer in stack.layers:
        attend = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, is_causal=False, attend=attend, **options: attend(*args, **options)
    return stack


STACKS = {
    "block of an instance": with_instance_block,
    "block of a subclass": lambda: TransformerEncoder(EncoderLayer(*SIZES, batch_first=True), 2),
    "forward of a subclass": lambda: TransformerEncoder(WholeEncoderLayer(*SIZES, batch_first=True), 2),
    "attention of a subclass": with_attention_without_hint,
    "forward of an instance": with_forward_of_an_instance,
    "block of a decoder": lambda: TransformerDecoder(DecoderLayer(*SIZES, batch_first=True), 2),
}


@pytest.mark.parametrize("hint", [None, True])
@pytest.mark.parametrize("name", STACKS)
def test_no_query_sees_later_keys(name: str, hint: bool | None) -> None:
    stack = STACKS[name]()
    x = torch.randn(2, 6, 16)
    other = torch.cat([x[:, :3], torch.randn(2, 3, 16)], dim=1)
    if isinstance(stack, TransformerDecoder):
        memory, hints = torch.randn(2, 4, 16), {"tgt_is_causal": hint}
        outs = [stack(y, memory, CAUSAL, None, IS_PADDING, **hints) for y in (x, other)]
    else:
        outs = [stack(y, CAUSAL, IS_PADDING, is_causal=hint) for y in (x, other)]
    assert torch.equal(outs[0][:, :3], outs[1][:, :3])
    assert not torch.equal(outs[0], outs[1])


def test_a_subclass_can_say_that_it_reads_the_hint() -> None:
    class Aware(fused_attn.TransformerEncoderLayer):
        takes_is_causal = True

        def _sa_block(self, *args, **options):
            return super()._sa_block(*args, **options)

    layer = Aware(*SIZES, batch_first=True)
    seen = []
    layer.self_attn.register_forward_pre_hook(lambda _, args, options: seen.append(options), with_kwargs=True)
    TransformerEncoder(layer, 1)(torch.randn(2, 6, 16), CAUSAL, IS_PADDING)
    assert [(options["attn_mask"], options["is_causal"]) for options in seen] == [(None, True)]


@pytest.mark.parametrize("options", [{}, {"mask": CAUSAL}, {"mask": CAUSAL, "src_key_padding_mask": IS_PADDING}])
def test_a_hook_that_asks_for_weights_gets_those_of_the_causal_mask(options: dict) -> None:
    stack = TransformerEncoder(fused_attn.TransformerEncoderLayer(*SIZES, batch_first=True), 1)
    attention, weights = stack.layers[0].self_attn, []
    attention.register_forward_pre_hook(
        lambda _, args, given: (args, {**given, "need_weights": True}), with_kwargs=True
    )
    attention.register_forward_hook(lambda _, args, out: weights.append(out[1]))
    x = torch.randn(2, 6, 16)
    out = stack(x, is_causal=True, **options)
    (found,) = weights
    torch.testing.assert_close(found.triu(1), torch.zeros(2, 6, 6))
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 6))
    attention._forward_pre_hooks.clear()
    torch.testing.assert_close(stack(x, is_causal=True, **options), out)


def test_masks_without_values_are_passed_on() -> None:
    stack = TransformerEncoder(fused_attn.TransformerEncoderLayer(*SIZES, batch_first=True), 2).eval()
    x = torch.randn(2, 6, 16)
    expected = stack(x, CAUSAL, IS_PADDING)

    def call(mask: Tensor) -> Tensor:
        return stack(x, mask, IS_PADDING, is_causal=True)

    torch.testing.assert_close(make_fx(call)(CAUSAL)(CAUSAL), expected)
    masks = torch.stack([CAUSAL, CAUSAL.roll(1, 0).fill_diagonal_(False)])
    batched = torch.vmap(lambda mask: stack(x, mask, IS_PADDING))(masks)
    torch.testing.assert_close(batched, torch.stack([stack(x, mask, IS_PADDING) for mask in masks]))
    on_meta = TransformerEncoder(fused_attn.TransformerEncoderLayer(*SIZES, batch_first=True, device="meta"), 2)
    out = on_meta(x.to("meta"), CAUSAL.to("meta"), IS_PADDING.to("meta"), is_causal=True)
    assert out.is_meta and out.shape == x.shape


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")
def test_a_trace_takes_other_masks() -> None:
    stack = TransformerEncoder(fused_attn.TransformerEncoderLayer(*SIZES, batch_first=True), 2).eval()
    x = torch.randn(2, 6, 16)
    traced = torch.jit.trace(stack, (x, CAUSAL, IS_PADDING), check_trace=False)
    for mask in (CAUSAL, torch.zeros_like(CAUSAL)):
        torch.testing.assert_close(traced(x, mask, IS_PADDING), stack(x, mask, IS_PADDING))


@pytest.mark.parametrize("kind", ["Linear", "LayerNorm"])
def test_a_class_that_was_patched_before_the_import_keeps_its_patch(kind: str) -> None:
    """Native calls, which compute without gradients, would leave the patch out."""
    program = f"""
import torch
from torch import nn
forward = nn.{kind}.forward
nn.{kind}.forward = lambda self, x: forward(self, x).round(decimals=1)
import fused_attn
layer = fused_attn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
x = torch.randn(2, 6, 64)
recorded = layer(x)
with torch.no_grad():
    torch.testing.assert_close(layer(x), recorded)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_watched_and_differentiated_masks_are_compared() -> None:
    """FlopCounterMode only watches. A mask that torch.func differentiates has values, too."""
    stack = TransformerDecoder(fused_attn.TransformerDecoderLayer(*SIZES, batch_first=True), 2)
    x, memory = torch.randn(2, 6, 16), torch.randn(2, 4, 16)
    expected = stack(x, memory, cache=KVCache(2))
    with FlopCounterMode(display=False):
        torch.testing.assert_close(stack(x, memory, CAUSAL, cache=KVCache(2)), expected)

    def loss(x: Tensor) -> Tensor:
        mask = torch.zeros_like(x[0, :, :6]).masked_fill(CAUSAL, float("-inf"))
        return stack(x, memory, mask, None, IS_PADDING).sum()

    hidden = torch.zeros(6, 6).masked_fill(CAUSAL, float("-inf"))
    (expected,) = torch.autograd.grad(stack(x.requires_grad_(), memory, hidden, None, IS_PADDING).sum(), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)


def wrapped(method):
    """As accelerate wraps the forward of a module."""

    @functools.wraps(method)
    def forward(*args, **options):
        return method(*args, **options)

    return forward


@pytest.mark.parametrize("wrap", [functools.partial, torch.compile, wrapped])
def test_wrapped_methods_of_instances_count_as_their_own(wrap) -> None:
    layer = fused_attn.TransformerEncoderLayer(*SIZES, batch_first=True)
    layer.forward = wrap(layer.forward)
    layer.self_attn.forward = wrap(layer.self_attn.forward)
    assert layer.takes_is_causal
    for other in (functools.partial(block_without_hint, layer), mock.Mock(wraps=layer.forward)):
        layer.forward = other
        assert not layer.takes_is_causal


def test_layers_that_may_ignore_the_flag_take_no_nested_tensors() -> None:
    rows = torch.nested.nested_tensor([torch.randn(5, 16), torch.randn(2, 16)], layout=torch.jagged)
    stack = TransformerEncoder(EncoderLayer(*SIZES, batch_first=True), 2)
    with pytest.raises(ValueError, match="is_causal: expected False with nested tensors, as a layer may not read the"):
        stack(rows, is_causal=True)


def test_a_decoder_with_attention_of_another_class_checks_no_memory() -> None:
    class Broadcasting(nn.Module):
        batch_first = True

        def forward(self, query, key, value, **options):
            return query + key.mean(), None

    layer = fused_attn.TransformerDecoderLayer(*SIZES, batch_first=True)
    layer.multihead_attn = Broadcasting()
    assert layer(torch.randn(2, 5, 16), torch.randn(1, 2, 3, 16)).shape == (2, 5, 16)


def test_a_stack_with_a_forward_of_its_own_takes_other_layers() -> None:
    class Stack(TransformerEncoder):
        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    assert Stack(nn.Linear(16, 16), 2)(torch.randn(2, 16)).shape == (2, 16)
    assert not Stack(nn.Linear(16, 16), 2).takes_cache
