"""The native constructors of named tuples make what the classes make, and check the number of fields."""

from __future__ import annotations

import pytest
from torch import Tensor, zeros

from fused_attn.attention import inputs
from fused_attn.attention.inputs import Gradients, Inputs, Saved

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    "kind, constructor",
    [(Inputs, inputs.inputs_of), (Saved, inputs.saved_of), (Gradients, inputs.gradients_of)],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_constructor_makes_what_the_class_makes(kind, constructor):
    fields: list[Tensor | None] = [zeros(1), *[None] * (len(kind._fields) - 1)]
    made = constructor(*fields)
    assert type(made) is kind
    assert all(x is y for x, y in zip(made, kind(*fields), strict=True))
    assert made._asdict() == kind(*fields)._asdict()


@pytest.mark.skipif(inputs._C is None, reason="the native kernels are not built")
def test_a_wrong_number_of_fields_is_an_error():
    for given in (3, 14, 16):
        with pytest.raises(TypeError, match=f"Inputs: expected 15 items, got {given}"):
            inputs.inputs_of(*[None] * given)
    for kind, count in ((3, 3), (list, 3), (Saved, "4"), (Saved,)[:1] * 2):
        with pytest.raises(TypeError, match="constructor"):
            inputs._C.constructor(kind, count)
    with pytest.raises(TypeError, match="2 arguments"):
        inputs._C.constructor(Saved)
