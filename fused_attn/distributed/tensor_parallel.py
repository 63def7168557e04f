"""Tensor parallelism for `FusedMultiheadAttention` and the Transformer layers: each rank holds some of the heads.

>>> import torch
>>> from fused_attn import TransformerEncoder, TransformerEncoderLayer
>>> from fused_attn.distributed import tensor_parallel_plan
>>> model = TransformerEncoder(TransformerEncoderLayer(64, 4, batch_first=True), num_layers=1)
>>> list(tensor_parallel_plan(model, sequence_parallel=False))
['layers.0.self_attn', 'layers.0.linear1', 'layers.0.linear2']

With a mesh, ``torch.distributed.tensor.parallel.parallelize_module(model, mesh, plan)`` applies the plan.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel
from torch.distributed.tensor.parallel.style import ParallelStyle

from fused_attn.attention import checks

_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_STACKS = (nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer)
_PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def tensor_parallel_plan(module: nn.Module, *, sequence_parallel: bool = True) -> dict[str, ParallelStyle]:
    """The plan by which `parallelize_module` shares a model among the ranks of a mesh of one dimension.

    The input projections of attention and the first linear layer are divided by columns, the output projection and the
    second linear layer by rows. The model takes and returns plain tensors that are the same on all ranks.

    Args:
        module: a `FusedMultiheadAttention`, a layer or a stack of `fused_attn.nn`, or a model that contains some.
        sequence_parallel: norms, dropout and residual sums see a part of the sequence on each rank. The results do not
            change. The activations between the sublayers take 1 / ranks of the memory.

    Returns:
        A style for each module that the plan changes, by name. ``""`` is the module itself.

    Raises:
        TypeError: module is no module, or sequence_parallel is no bool.
        ValueError: the module contains no fused attention. When the plan is applied: an option of the attention cannot
            be shared, or the ranks do not divide its heads.
    """
    if not isinstance(module, nn.Module):
        raise checks.wrong_type("module", "a torch.nn.Module", module)
    checks.check_flag("sequence_parallel", sequence_parallel)
    plan: dict[str, ParallelStyle] = {}
    inside: list[str] = []  # names of layers and stacks whose residual stream is sharded already
    for name, part in module.named_modules():
        prefix = f"{name}." if name else ""
        is_inner = any(name.startswith(outer) for outer in inside)
        if isinstance(part, (*_LAYERS, *_STACKS)) and not is_inner and _has_fused_attention(part):
            inside.append(prefix)
            if sequence_parallel:
                plan[name] = _ShardedStream(_sequence_dim(part))
        if isinstance(part, _LAYERS) and _has_fused_attention(part):
            plan.update(_plan_of_layer(prefix, part, sequence_parallel))
        elif sequence_parallel and is_inner and isinstance(part, nn.LayerNorm) and name not in plan:
            plan[name] = SequenceParallel(sequence_dim=_sequence_dim(module.get_submodule(name.rpartition(".")[0])))
        elif _is_fused(part) and not is_inner:
            plan[name] = AttentionParallel()
    if not plan:
        raise checks.fail("module", "a module that contains a FusedMultiheadAttention", type(module).__name__)
    return plan


def _plan_of_layer(prefix: str, layer: nn.Module, sequence_parallel: bool) -> dict[str, ParallelStyle]:
    """The plan of an encoder layer or a decoder layer."""
    dim = _sequence_dim(layer)
    stream = Shard(dim) if sequence_parallel else Replicate()
    is_local = not sequence_parallel
    plan: dict[str, ParallelStyle] = {}
    for name in ("self_attn", "multihead_attn"):
        if hasattr(layer, name):
            plan[prefix + name] = AttentionParallel(stream, use_local_output=is_local)
    plan[prefix + "linear1"] = ColwiseParallel(input_layouts=stream, use_local_output=is_local)
    plan[prefix + "linear2"] = RowwiseParallel(output_layouts=stream, use_local_output=is_local)
    if sequence_parallel:
        for name, part in layer.named_children():
            if isinstance(part, nn.LayerNorm):
                plan[prefix + name] = SequenceParallel(sequence_dim=dim)
    return plan


class AttentionParallel(ParallelStyle):
    """Shares the heads of a `FusedMultiheadAttention` among the ranks.

    The parameters become DTensors. A packed ``in_proj_weight`` is held as three, because a rank needs the rows of its
    heads from each of query, key and value. `state_dict` and `load_state_dict` still speak of ``in_proj_weight``, so
    checkpoints of ``torch.distributed.checkpoint`` fit the module that is not shared, and the other way round.

    Args:
        output_layout: the placement of the output. The default is Replicate.
        use_local_output: return a plain tensor and no DTensor.

    Inputs that are no DTensors are the same on all ranks.
    """

    def __init__(self, output_layout: Shard | Replicate | None = None, *, use_local_output: bool = True):
        super().__init__()
        if output_layout is not None and not isinstance(output_layout, (Shard, Replicate)):
            raise checks.wrong_type("output_layout", "None, Shard or Replicate", output_layout)
        checks.check_flag("use_local_output", use_local_output)
        self.output_layout = output_layout or Replicate()
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """What `parallelize_module` calls."""
        attention = _checked(module, device_mesh.size())

        def shared(x: Tensor, placement: Shard | Replicate) -> nn.Parameter:
            x_shared = distribute_tensor(x, device_mesh, [placement], src_data_rank=self.src_data_rank)
            return nn.Parameter(x_shared, requires_grad=x.requires_grad)

        if attention.in_proj_weight is None:
            weights = [getattr(attention, name) for name in _PROJECTIONS]
        else:
            weights = list(attention.in_proj_weight.split(_rows(attention)))
            attention.in_proj_weight = None
            attention.register_state_dict_post_hook(_pack)
            attention.register_load_state_dict_pre_hook(_unpack)
        for name, weight in zip(_PROJECTIONS, weights, strict=True):
            setattr(attention, name, shared(weight.detach().requires_grad_(weight.requires_grad), Shard(0)))
        if attention.in_proj_bias is not None:
            attention.in_proj_bias = shared(attention.in_proj_bias, Replicate())
        RowwiseParallel(output_layouts=self.output_layout, use_local_output=False)._apply(
            attention.out_proj, device_mesh
        )
        if attention.rotary is not None:  # It multiplies by plain tensors, which are the same for all heads.
            attention.rotary.register_forward_pre_hook(lambda _, inputs: (inputs[0].to_local(), *inputs[1:]))
            attention.rotary.register_forward_hook(lambda _, __, x: DTensor.from_local(x, device_mesh, [Shard(2)]))
        attention.register_forward_pre_hook(_Replicated(device_mesh), with_kwargs=True)
        if self.use_local_output:
            attention.register_forward_hook(lambda _, __, results: (results[0].to_local(), results[1]))
        return attention


class _Replicated:
    """The forward pre-hook that replicates query, key and value. A tensor that is passed twice stays one tensor."""

    def __init__(self, mesh: DeviceMesh):
        self.mesh = mesh

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        named = dict(zip(("query", "key", "value", "key_padding_mask", "need_weights"), args, strict=False)) | kwargs
        if named.get("need_weights", True):
            raise checks.fail("need_weights", "False in a module whose heads are shared by ranks", "True")
        if named.get("cache") is not None:
            raise checks.fail("cache", "None in a module whose heads are shared by ranks", "a cache")
        seen: dict[int, Tensor] = {}

        def replicated(x: Tensor) -> Tensor:
            if id(x) not in seen:
                seen[id(x)] = _as_dtensor(x, self.mesh).redistribute(placements=[Replicate()])
            return seen[id(x)]

        inputs = ("query", "key", "value")
        changed = {name: replicated(x) if name in inputs else x for name, x in kwargs.items()}
        return (*map(replicated, args[:3]), *args[3:]), changed


class _ShardedStream(ParallelStyle):
    """A layer or a stack whose inputs become shards of the sequence, and whose output becomes whole again.

    Shards that come in as DTensors stay shards.
    """

    def __init__(self, sequence_dim: int):
        super().__init__()
        self.sequence_dim = sequence_dim

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """What `parallelize_module` calls."""
        streams = ("src", "tgt", "memory")

        def enter(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            def sharded(name: str, x: Tensor) -> Tensor:
                if x.dim() != 3:
                    raise checks.fail(name, "a batch, (N, L, E) or (L, N, E)", f"shape {tuple(x.shape)}")
                return _as_dtensor(x, device_mesh).redistribute(placements=[Shard(self.sequence_dim)])

            if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
                names: tuple[str, ...] = ("src",)
            else:
                names = ("src", "tgt") if isinstance(module, nn.Transformer) else ("tgt", "memory")
            args = (*map(sharded, names, args), *args[len(names) :])
            return args, {name: sharded(name, x) if name in streams else x for name, x in kwargs.items()}

        def leave(_: nn.Module, __: tuple, out: Tensor) -> Tensor:
            return out.redistribute(placements=[Replicate()]).to_local()  # type: ignore[attr-defined]

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave)
        return module


def _checked(module: nn.Module, ranks: int) -> Any:
    """The module, if its heads can be shared by so many ranks."""
    attention: Any = module
    if not _is_fused(module):
        raise checks.fail("module", "a FusedMultiheadAttention", type(module).__name__)
    for name in ("num_heads", "num_kv_heads"):
        if (heads := getattr(attention, name)) % ranks:
            raise checks.fail("device_mesh", f"a number of ranks that divides {name}={heads}", f"{ranks} ranks")
    if attention.bias_k is not None or attention.add_zero_attn:
        raise checks.fail("module", "one without add_bias_kv and add_zero_attn", "one with appended rows")
    return attention


def _rows(attention: Any) -> list[int]:
    """The rows of the packed projection that belong to query, key and value."""
    kv_rows = attention.num_kv_heads * attention.head_dim
    return [attention.embed_dim, kv_rows, kv_rows]


def _pack(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: dict) -> None:
    """The hook of `state_dict`: the three projections become ``in_proj_weight``."""
    weights = [state_dict.pop(prefix + name) for name in _PROJECTIONS]
    state_dict[prefix + "in_proj_weight"] = torch.cat(weights)


def _unpack(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """The hook of `load_state_dict`: ``in_proj_weight`` becomes three projections, sharded like the parameters."""
    packed = state_dict.pop(prefix + "in_proj_weight", None)
    if packed is None:
        return  # `load_state_dict` reports the keys that are missing
    for name, weight in zip(_PROJECTIONS, packed.split(_rows(module)), strict=True):
        own: Any = getattr(module, name)
        state_dict[prefix + name] = _as_dtensor(weight, own.device_mesh).redistribute(placements=own.placements)


def _as_dtensor(x: Tensor, mesh: DeviceMesh) -> DTensor:
    """x as a DTensor. A plain tensor is the same on all ranks."""
    return x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [Replicate()], run_check=False)


def _is_fused(module: nn.Module) -> bool:
    """Whether the module is a `FusedMultiheadAttention`, whose package is above this one."""
    return isinstance(module, nn.MultiheadAttention) and hasattr(module, "num_kv_heads")


def _has_fused_attention(module: nn.Module) -> bool:
    return any(map(_is_fused, module.modules()))


def _sequence_dim(module: nn.Module) -> int:
    """The dimension that counts positions in the inputs of the first attention of a module."""
    first: Any = next(part for part in module.modules() if _is_fused(part))
    return 1 if first.batch_first else 0
