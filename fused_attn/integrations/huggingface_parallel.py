"""transformers models whose sequences are shared by several ranks, with windows, sinks, softcap and padding.

    from fused_attn.integrations import huggingface_parallel
    model = huggingface_parallel.context_parallel(AutoModelForCausalLM.from_pretrained(...), mesh)
    loss = model(input_ids=tokens, labels=tokens).loss  # each rank computes its part of the rows

`attach` does the same in a Trainer or an Accelerator of accelerate, whose own context parallelism knows causal masks
only: it refuses windows and padding, and calls SDPA.

The parts of a model that mix no tokens (norms, linear layers, experts, the loss) see the rows of their rank. Only
attention sends messages, by `fused_attn.distributed.context_parallel_attention`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fused_attn.attention import checks
from fused_attn.distributed import context_parallel_attention, shard_sequence
from fused_attn.distributed.attention import METHODS
from fused_attn.distributed.sequence import ROWS_OF_RANK, Sharding, group_of, shardings_of
from fused_attn.integrations import huggingface, huggingface_masks

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import find_packed_sequence_indices
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
except ImportError as error:
    raise ImportError(
        f"fused_attn.integrations.huggingface_parallel needs transformers 5.15 or newer ({error}); the extra brings "
        "it: pip install -e '.[huggingface]'"
    ) from error

#: The ``model_type`` of the models that the tests compare with one process. Others may mix tokens outside of attention
#: (convolutions, states, routing by the whole sequence), which would be wrong without an error.
MODEL_TYPES = ("gemma", "gemma2", "gpt2", "gpt_oss", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3")

#: What a model takes that has a row for each token, (B, L) or (B, L, columns).
_ROWS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "shift_labels")

#: Arguments of models that speak of other tokens than those of the batch.
_REFUSED = ("cache", "past_key_values", "logits_to_keep", "encoder_hidden_states")

_NO_LABEL = -100  # the label of tokens that have no loss, as in transformers

_names = (f"{huggingface.NAME}.ranks{number}" for number in itertools.count())


def context_parallel(
    model: PreTrainedModel,
    mesh: DeviceMesh | dist.ProcessGroup,
    *,
    method: str = "auto",
    backend: str | None = None,
    compare_ranks: bool = True,
) -> PreTrainedModel:
    """Share the sequences of a causal language model among the ranks of a mesh, in place.

    The model takes whole batches, the same on all ranks: ``input_ids`` or ``inputs_embeds``, ``labels`` or
    ``shift_labels``, ``attention_mask`` (B, L) and ``position_ids``. Logits and hidden states are those of the rows of
    the rank, in the order of `fused_attn.distributed.shard_sequence`. Every rank needs rows, so W ranks take batches of
    more than 8 (W - 1) tokens.

    On every rank, ``loss`` has the value that one process would compute. The gradient of one process is the mean of the
    gradients of the ranks. FSDP2 and DistributedDataParallel compute this mean. Whoever uses neither adds up the
    gradients and divides by the number of ranks. ``num_items_in_batch`` divides the loss as in one process.

    ``model.set_attn_implementation("fused_attn")``, or another name, ends the sharing: the model then computes whole
    batches in each process, for instance in ``generate``. Another call of `context_parallel` shares the sequences
    again. A call for a model that is shared already replaces the earlier one. The model gets a copy of its
    configuration, so other models with the same configuration object do not change.

    Args:
        model: a causal language model of one of `MODEL_TYPES`, before or after FSDP2 is applied.
        mesh: the ranks that share the sequences; see `context_parallel_attention`.
        method: see `context_parallel_attention`.
        backend: see `fused_attention`.
        compare_ranks: whether each call of the model first compares the arguments of the ranks: names, shapes, dtypes,
            and checksums of integers. The contents of floating-point tensors are not compared. The comparison is a
            small collective, for which the host waits. Without the comparison, ranks that differ get wrong results, or
            wait for each other in vain.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: the model is none of these, or its rotary embedding depends on the longest position.
            When the model is called: there is a cache, packed sequences, a mask of more dimensions, or another argument
            that cannot be shared; or the batch is too short. With compare_ranks, arguments that differ between the
            ranks raise on all of them.
    """
    return _share(model, _Ranks(mesh, method, backend, compare_ranks))


def _share(model: PreTrainedModel, ranks: _Ranks) -> PreTrainedModel:
    """Checks the model and puts the hooks and the attention of these ranks on the model."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a causal language model of transformers, got {type(model).__name__}")
    config: Any = model.config
    if config.model_type not in MODEL_TYPES or not _is_causal_model(model):
        raise checks.fail(
            "model", f"a causal language model (...ForCausalLM, GPT2LMHeadModel) of a type in {MODEL_TYPES}",
            f"{type(model).__name__} of type {config.model_type!r}",
        )  # fmt: skip
    for kind in _rope_types(config):
        if "dynamic" in kind or kind == "longrope":
            raise checks.fail("model", "a rotary embedding that does not depend on the longest position", repr(kind))
    _remove_hooks(model)
    _copy_config(model)
    AttentionInterface.register(ranks.name, ranks.attention)
    AttentionMaskInterface.register(ranks.name, ranks.mask)
    huggingface.enable(model, ranks.backend)
    model.set_attn_implementation(ranks.name)
    model.register_forward_pre_hook(ranks.shard, with_kwargs=True)
    model.register_forward_hook(ranks.join, with_kwargs=True)
    return model


def attach(trainer: Any, *, method: str = "auto", backend: str | None = None, compare_ranks: bool = True) -> None:
    """Put `context_parallel` in the place of accelerate's context parallelism, before training begins.

        args = TrainingArguments(parallelism_config=ParallelismConfig(cp_size=2), fsdp=True, ...)
        trainer = Trainer(model, args, ...)
        huggingface_parallel.attach(trainer)
        trainer.train()

    accelerate gives the ranks of a sequence the same batches and shards the parameters over them. The model computes
    everything else.

    Args:
        trainer: a Trainer of transformers, whose model is shared here; or an Accelerator before ``prepare``, whose
            model you share by `context_parallel`.
        method, backend, compare_ranks: see `context_parallel`.

    Raises:
        TypeError: trainer is neither.
        ValueError: there is no context parallelism in the ParallelismConfig, or the TrainingArguments have a
            label_smoothing_factor.
    """
    accelerator = getattr(trainer, "accelerator", trainer)
    if not hasattr(accelerator, "parallelism_config"):
        raise checks.wrong_type("trainer", "a Trainer of transformers or an Accelerator", trainer)
    config = accelerator.parallelism_config
    if config is None or not config.cp_enabled:
        raise checks.fail("trainer", "one with ParallelismConfig(cp_size=2) or more ranks", repr(config))
    smoothing = getattr(getattr(trainer, "args", None), "label_smoothing_factor", 0.0)
    if smoothing:
        expected = "one with label_smoothing_factor=0, as its loss would see the logits of one rank only"
        raise checks.fail("trainer", expected, smoothing)
    _replace(accelerator, "_prepare_cp", lambda *args: args)  # which refuses windows and drops masks
    if trainer is not accelerator:
        _replace(trainer, "_prepare_context_parallel_inputs", lambda _, inputs: (contextlib.nullcontext, inputs))
        mesh = accelerator.torch_device_mesh["cp"]
        _share(trainer.model, _Ranks(mesh, method, backend, compare_ranks, of_trainer=True))


class _Ranks:
    """The ranks that share the sequences of one model, or of its copies.

    of_trainer: whether the Trainer gives num_items_in_batch, and scales the loss by the number of ranks
    name: that of the attention, for ``attn_implementation``
    length: the rows of the whole batch of the call that runs; `mask` hands the number on to the layers
    """

    def __init__(
        self, mesh: DeviceMesh | dist.ProcessGroup, method: str, backend: str | None, compare_ranks: bool,
        of_trainer: bool = False,
    ):  # fmt: skip
        if method not in METHODS:
            raise checks.fail("method", f"one of {METHODS}", repr(method))
        checks.check_flags(compare_ranks=compare_ranks)
        self.mesh, self.method, self.backend, self.of_trainer = mesh, method, backend, of_trainer
        self.group, self.name, self.length = group_of(mesh), next(_names), 0
        self.world = dist.get_world_size(self.group)
        self.compares = compare_ranks and self.world > 1

    def __deepcopy__(self, memo: dict) -> _Ranks:
        """Copies of a model keep the name of the attention, and a process group cannot be copied."""
        return self

    def shard(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """The forward pre-hook of the model: the rows of this rank instead of the whole batch."""
        if not self._is_chosen(model):
            return None
        if self.compares:
            self._compare(model, args, kwargs)
        # From here on, what raises on one rank raises on all of them.
        given = {name: x for name, x in kwargs.items() if x is not None}
        if len(args) > 1:
            raise checks.fail("inputs", "one positional argument, input_ids, and the others by name", f"{len(args)}")
        if args:
            given["input_ids"] = args[0]
        tokens = given.get("input_ids", given.get("inputs_embeds"))
        if tokens is None:
            raise checks.fail("input_ids", "the tokens (B, L) of the whole batch", None)
        _check_inputs(given, tokens.shape[:2], model.config)
        device, (batch, self.length) = tokens.device, tokens.shape[:2]
        self._check_length(self.length)
        if "attention_mask" not in given:
            if "position_ids" in given and find_packed_sequence_indices(given["position_ids"]) is not None:
                raise checks.fail("position_ids", "those of one sequence in each batch entry", "packed sequences")
            # Without a mask, transformers would take the two pieces of a rank for packed sequences.
            given["attention_mask"] = torch.ones(batch, self.length, dtype=torch.bool, device=device)
        given.setdefault("position_ids", torch.arange(self.length, device=device).unsqueeze(0))
        labels = given.pop("labels", None)
        if labels is not None and "shift_labels" not in given:
            given["shift_labels"] = F.pad(labels[:, 1:], (0, 1), value=_NO_LABEL)
        if "shift_labels" in given:
            # A model divides the sum of its losses by this number. The mean over the ranks is the loss of the batch.
            if "num_items_in_batch" not in given:
                given["num_items_in_batch"] = (given["shift_labels"] != _NO_LABEL).sum() / self.world
            elif not self.of_trainer:
                given["num_items_in_batch"] = given["num_items_in_batch"] / self.world
        given = {name: shard_sequence(x, self.mesh, 1) if name in _ROWS else x for name, x in given.items()}
        if "shift_labels" in given:
            given["labels"] = given["shift_labels"]  # models compute a loss if there are labels
        return (), given | {"use_cache": False}

    def join(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> Any:
        """The forward hook of the model: the loss has the value of the whole batch and the gradient of the rank."""
        if "shift_labels" not in kwargs or not self._is_chosen(model):
            return out
        loss = out[0]  # the first entry of a tuple and of a ModelOutput
        whole = loss.detach().clone()
        dist.all_reduce(whole, group=self.group)
        loss = loss + (whole / self.world - loss.detach())
        if isinstance(out, tuple):
            return (loss, *out[1:])
        out["loss"] = loss
        return out

    def _is_chosen(self, model: nn.Module) -> bool:
        """Whether the model still has the attention of these ranks. A user may have chosen another one since."""
        config: Any = model.config
        return config._attn_implementation == self.name

    @torch.compiler.disable  # a graph could hold neither the comparison nor its error
    def _compare(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raises ValueError on all ranks if they call the model in different ways."""
        given = {name: x for name, x in kwargs.items() if x is not None} | dict(zip(("input_ids",), args, strict=False))
        described = {name: _described(given[name]) for name in sorted(given)}
        described |= {"positional arguments": len(args), "model.training": model.training}
        described["torch.is_grad_enabled()"] = torch.is_grad_enabled()
        devices: Any = (x.device for x in itertools.chain(given.values(), model.parameters()) if isinstance(x, Tensor))
        shardings_of({}, self.group, next(devices), described)

    def _check_length(self, length: int) -> None:
        """Raises ValueError if a rank would have no rows, which models do not expect."""
        sharding = Sharding.of(length, self.world)
        if min(map(sharding.rows, range(self.world))) == 0:
            least = ROWS_OF_RANK // 2 * (self.world - 1)
            raise checks.fail("input_ids", f"more than {least} tokens for {self.world} ranks", f"{length}")

    def mask(self, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        """A mask function for transformers: the band of the whole sequences with the padding (B, rows of this rank)."""
        if attention_mask is None:
            raise checks.fail("attention_mask", "a call of the whole model that context_parallel was given", None)
        rows = attention_mask.shape[1]
        # The numbers of a band follow from the whole length. Padding ends with the rows of this rank.
        found = huggingface.attention_mask_of(
            q_length=self.length, kv_length=self.length, attention_mask=attention_mask, **kwargs
        )
        if found is None or not huggingface_masks.is_band(found):
            raise checks.fail("attention_mask", "causal masks and windows in a model that ranks share", "another mask")
        # The mask carries the whole length. Checkpointing computes a layer again when a later call has another length.
        return found[:, :, :1, :, :rows].expand(-1, -1, self.length, -1, -1)

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
    ) -> tuple[Tensor, None]:
        """An attention function for transformers; see `huggingface.attention`. The rows are those of this rank."""
        options = huggingface.options_of(query, key, kwargs, self.backend)
        if attention_mask is None or attention_mask.ndim != 5:
            raise checks.fail("attention_mask", "the one of the model whose ranks share the sequence", "another one")
        if options["sinks"] is not None and options["sinks"].requires_grad:
            # All ranks get the sum of the gradients of the sinks, but of the other parameters their own summand.
            options["sinks"] = options["sinks"].view_as(options["sinks"])
            options["sinks"].register_hook(functools.partial(torch.mul, other=1.0 / self.world))
        out: Any = context_parallel_attention(
            query, key, value, mesh=self.mesh, method=self.method, seqlens=(attention_mask.shape[2],) * 2,
            key_padding_mask=~attention_mask[:, 0, 0, 0], **options, **huggingface_masks.band_of(attention_mask),
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None


def _check_inputs(given: dict[str, Any], shape: torch.Size, config: Any) -> None:
    """Raises ValueError if the ranks cannot share an argument of the model. shape: (B, L) of the tokens"""
    for name in _REFUSED:
        x = given.get(name)
        if x is not None and not (isinstance(x, int) and x == 0):
            expected = (
                "no such argument in a model whose ranks share the sequence; before generate(), call "
                f'model.set_attn_implementation("{huggingface.NAME}")'
            )
            raise checks.fail(name, expected, type(x).__name__)
    if given.get("output_router_logits", getattr(config, "output_router_logits", False)):
        raise checks.fail("output_router_logits", "False, as the auxiliary loss is no sum over the rows", "True")
    for name, x in given.items():
        if name in _ROWS or name == "labels":
            is_right = x.dim() in ((3,) if name == "inputs_embeds" else (2,)) and x.shape[1] == shape[1]
            if not is_right:
                raise checks.fail(name, f"a row for each of the {shape[1]} tokens", f"shape {tuple(x.shape)}")
        elif isinstance(x, Tensor) and name != "num_items_in_batch":
            raise checks.fail(name, f"one of the arguments {(*_ROWS, 'labels')}", "another tensor")


def _described(x: Any) -> Any:
    """An argument of the model, for the comparison of the ranks. Equal arguments have equal descriptions."""
    if not isinstance(x, Tensor):
        return x if isinstance(x, bool | int | float | str) else type(x).__name__
    # Ranks may compute floating-point tensors for themselves, and may round them in different ways.
    checksum = "" if x.is_floating_point() or x.is_complex() else f" and checksum {_checksum(x):x}"
    return f"{x.dtype} of shape {tuple(x.shape)}{checksum}"


def _checksum(x: Tensor) -> int:
    """A number that differs for nearly all different integers or bools, also if only their order differs."""
    # The factor is large and odd, and int64 wraps around. So the bits of neighbouring places have little in common.
    places = torch.arange(1, x.numel() + 1, device=x.device) * 0x9E3779B97F4A7C1
    return int((x.flatten() * (places ^ (places >> 29))).sum()) & (2**63 - 1)


def _remove_hooks(model: nn.Module) -> None:
    """Removes the hooks of an earlier call of `context_parallel`, if there was one."""
    for hooks, options in (
        (model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs),
        (model._forward_hooks, model._forward_hooks_with_kwargs),
    ):
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), _Ranks)]:
            del hooks[key]
            options.pop(key, None)


def _copy_config(model: nn.Module) -> None:
    """Gives a model a configuration of its own, in all of its modules. Other models may share the present one."""
    shared = model.config
    own = copy.deepcopy(shared)
    for module in model.modules():
        if vars(module).get("config") is shared:
            module.config = own


def _is_causal_model(model: nn.Module) -> bool:
    """Whether the class of the model, or one that the class is made of, is a causal language model of transformers."""
    return any(cls.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for cls in type(model).__mro__)


def _rope_types(config: Any) -> list[str]:
    """The kinds of rotary embedding of a model: one, or one for each type of its layers."""
    parameters = getattr(config, "rope_parameters", None) or {}
    tables = [x for x in parameters.values() if isinstance(x, dict)] or [parameters]
    return [table.get("rope_type", "default") for table in tables]


def _replace(owner: Any, name: str, function: Any) -> None:
    """Replaces a method of one object. The method must exist, so that another version is not silently left as it is."""
    if not hasattr(owner, name):
        raise checks.fail("trainer", f"a {type(owner).__name__} with the method {name}", "a version without")
    setattr(owner, name, function)
