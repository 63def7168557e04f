"""The samples with which PyTorch tests its attention modules give the same outputs and gradients with our modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from parity import assert_same
from torch import nn

from fused_attn import nn as fused

common_modules = pytest.importorskip(
    "torch.testing._internal.common_modules", reason="PyTorch's samples need expecttest"
)

CLASSES = {
    nn.MultiheadAttention: fused.FusedMultiheadAttention,
    nn.TransformerEncoder: fused.TransformerEncoder,
    nn.TransformerEncoderLayer: fused.TransformerEncoderLayer,
    nn.TransformerDecoderLayer: fused.TransformerDecoderLayer,
    nn.Transformer: fused.Transformer,
}
INFOS = [info for info in common_modules.module_db if info.module_cls in CLASSES]


def test_samples_are_there() -> None:
    assert {info.module_cls for info in INFOS} == set(CLASSES)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:Support for mismatched")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.module_cls.__name__)
def test_sample(info: Any, training: bool) -> None:
    torch.manual_seed(0)
    options = {"device": "cpu", "dtype": torch.float64, "requires_grad": True, "training": training}
    samples = info.module_inputs_func(info, **options)
    assert samples
    for sample in samples:
        build, call = sample.constructor_input, sample.forward_input
        # A stack takes dtype and device from the layer that its constructor gets.
        factory = {} if info.module_cls is nn.TransformerEncoder else {"dtype": torch.float64}
        theirs = info.module_cls(*build.args, **{**build.kwargs, **factory})
        ours = CLASSES[info.module_cls](*copy.deepcopy(build.args), **{**build.kwargs, **factory})
        ours.load_state_dict(theirs.state_dict(), strict=True)
        assert_same(ours.train(training), theirs.train(training), *call.args, **call.kwargs)
