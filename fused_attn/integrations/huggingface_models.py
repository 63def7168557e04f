"""What is known of the models of Hugging Face transformers: whose attention can be chosen, and how they read masks."""

from __future__ import annotations

import functools
import inspect
import sys
from types import ModuleType

import torch
from transformers import PreTrainedModel

#: If the source of a model's module contains this name, the attention of the model can be chosen by name.
INTERFACE = "ALL_ATTENTION_FUNCTIONS"

#: Models that use the interface, or share a file with models that do, but misread its masks. DeepSeek V4 appends
#: columns of numbers to its masks, so a mask must be additive, and must exist even if it hides nothing. The others also
#: give the masks to attention of their own, which would add the masks to its scores.
MISREADS_MASKS = ("bigbird_pegasus", "deepseek_v4", "gemma4_audio", "git", "informer with ProbSparse attention")

#: Models that cut rows or columns out of their masks, or lay masks of their own over them. Their masks must be dense.
#: `needs_dense_masks` finds more such models.
NEEDS_DENSE_MASKS = ("pix2struct_text_model", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "doge")


def kind_of(config) -> str | None:
    """The ``model_type`` of a configuration. Informer with ProbSparse attention counts as a type of its own."""
    kind = getattr(config, "model_type", None)
    is_sparse = kind == "informer" and config.attention_type == "prob"
    return "informer with ProbSparse attention" if is_sparse else kind


@torch.compiler.assume_constant_result
def check_reads_masks(config: type, kind: str | None) -> None:
    """Raises ValueError if the model of this configuration asks for masks but has attention of its own.

    Such a model expects additive masks, and would add True and False to its scores.
    """
    if kind in MISREADS_MASKS or _has_own_attention(_model_file(config)):
        raise ValueError(
            f"attn_implementation: expected another one for {config.__name__}, whose model has attention of its own "
            f'and would misread the masks of the fused kernel; use "eager"'
        )


@torch.compiler.assume_constant_result
def needs_dense_masks(config: type, kind: str | None) -> bool:
    """Whether the model of this configuration reads its masks as (B, 1, L, S).

    Models that lay masks of their own over them ask transformers never to skip a mask. The request does not always
    arrive here: for one token after a static cache, transformers itself forbids to skip masks.
    """
    return kind in NEEDS_DENSE_MASKS or any(_forbids_skips(_model_file(base)) for base in config.__mro__)


def _model_file(config: type) -> ModuleType | None:
    """The module of a model, if it stands beside the module of its configuration."""
    file = sys.modules.get(config.__module__.replace(".configuration_", ".modeling_"))
    return None if file is None or file.__name__ == config.__module__ else file


def _has_own_attention(file: ModuleType | None) -> bool:
    """Whether the attention that a file defines ignores the interface. Many files only put other models together."""
    if file is None or hasattr(file, INTERFACE):
        return False
    # transformers reads the same from the source, for all models of a file alike.
    return any(
        isinstance(x, type)
        and issubclass(x, PreTrainedModel)
        and x.__module__ == file.__name__
        and not x._can_set_attn_implementation()  # type: ignore[attr-defined]  # mypy keeps only `type`
        for x in vars(file).values()
    )


@functools.cache
def _forbids_skips(file: ModuleType | None) -> bool:
    """Whether the source of a model asks transformers never to skip a mask."""
    try:
        return file is not None and "allow_is_causal_skip" in inspect.getsource(file)
    except (OSError, TypeError):  # there is no source
        return False
