"""A step that a GPU replays: the host launches one CUDA graph instead of hundreds of kernels."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from fused_attn.attention import checks

#: A step is captured after so many ordinary calls, which compile kernels and fill caches.
WARM_UP_STEPS = 2
#: With fewer steps left, a capture costs more than it saves.
LEAST_STEPS = 4
#: The host may be so many steps ahead of the GPU.
STEPS_AHEAD = 4

#: Threads capture one after another, on one stream for each device: torch keeps memory for each stream that has been
#: used, and hands out few different ones.
_one_capture = threading.Lock()
_streams: dict[torch.device, torch.cuda.Stream] = {}


class Replayed:
    """Calls a step, and replays it as a CUDA graph as soon as possible.

    The step takes no arguments and returns nothing. It reads and writes the same tensors in every call.

    Args:
        step: the step.
        device: where the tensors are. Only steps on a GPU are captured.
        generator: the source of random numbers of the step, if any.
        cuda_graph: None = capture if possible; False = never; True = raise the error if the capture fails.
        model: the module whose step it is. Its hooks would not run in a replay, so a model with hooks is not captured.
            None = this step must not be captured.

    Raises:
        ValueError: cuda_graph is True, and the step cannot be captured; the message has the reason.
    """

    def __init__(
        self,
        step: Callable[[], None],
        device: torch.device,
        generator: torch.Generator | None,
        cuda_graph: bool | None,
        model: nn.Module | None,
    ):
        self._step, self._device, self._generator = step, device, generator
        reason = "" if cuda_graph is False else why_not(device, model)
        if cuda_graph and reason:
            raise checks.fail("cuda_graph", f"None or False, since {reason}", "True")
        self._may_capture = cuda_graph is not False and not reason
        self._must_capture = bool(cuda_graph)
        self.forget()

    def forget(self) -> None:
        """Drops the captured step, because it uses tensors that are no longer in use."""
        self._replay: Callable[[], None] | None = None
        self._calls = 0

    def __call__(self, remaining: int) -> None:
        """Runs the step. remaining: the number of steps to come at most, this one included."""
        if self._replay is not None:
            self._replay()
            return
        if self._may_capture and self._calls >= WARM_UP_STEPS and remaining >= LEAST_STEPS:
            try:
                self._replay = capture(self._step, self._device, self._generator)
            except RuntimeError as error:
                if self._must_capture:
                    raise
                self._may_capture = False
                warnings.warn(f"generate: the step is not replayed, because its capture failed: {error}", stacklevel=2)
            else:
                self._replay()
                return
        self._step()
        self._calls += 1


def why_not(device: torch.device, model: nn.Module | None) -> str:
    """Why a step of the model cannot be captured; an empty text if it can."""
    if device.type != "cuda":
        return f"the model is on {device}, which has no CUDA graphs"
    if model is None:
        return "a layer of the decoder takes no cache"
    if nn_module._has_any_global_hook():
        return "there are global hooks, which a replay would not call"
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return f"{type(module).__name__} has hooks or a forward of its own, which a replay would not call"
        for parameter in module.parameters(recurse=False):
            if type(parameter) is not nn.Parameter or parameter.device != device:
                return f"{type(module).__name__} has parameters that are sharded, quantised or on another device"
    return ""


def capture(step: Callable[[], None], device: torch.device, generator: torch.Generator | None) -> Callable[[], None]:
    """Captures a step as a CUDA graph, and returns what replays it. The capture itself does not run the step.

    A capture cannot use the memory that torch has cached. So this memory is given back if there is no other.
    """
    try:
        return _capture(step, device, generator)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return _capture(step, device, generator)


def _capture(step: Callable[[], None], device: torch.device, generator: torch.Generator | None) -> Callable[[], None]:
    """See `capture`.

    This is not `torch.cuda.graph`, for three reasons. Its stream belongs to the device of the first capture of the
    process. The stream stays the current one if the capture fails. The allocator gives all cached memory back first.
    """
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with _one_capture, torch.cuda.device(device):
        if device not in _streams:
            _streams[device] = torch.cuda.Stream(device)
        stream = _streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            # By default, what other threads do with a GPU meanwhile would end the capture, or fail.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(device).wait_stream(stream)
    return graph.replay


class EndWatch:
    """Tells when all targets have ended. The host does not wait for the newest step of a GPU, but for an earlier one.

    So a few more steps may run, which append padding.

    Args:
        is_done: returns a () bool tensor.
        device: the device of that tensor.
    """

    def __init__(self, is_done: Callable[[], Tensor], device: torch.device):
        self._is_done, self._device, self._is_cuda = is_done, device, device.type == "cuda"
        self._steps = 0
        if self._is_cuda:
            # The flags are in memory from which the host can read while the GPU works, one for each step in flight.
            self._flags = torch.zeros(STEPS_AHEAD, dtype=torch.bool, device="cpu").pin_memory().unbind()
            self._events = [torch.cuda.Event() for _ in self._flags]

    def has_ended(self) -> bool:
        """Whether the result is final. Called once after each step."""
        if not self._is_cuda:
            return bool(self._is_done())
        slot = self._steps % STEPS_AHEAD
        if self._steps >= STEPS_AHEAD:
            self._events[slot].synchronize()
            if self._flags[slot]:
                return True
        self._flags[slot].copy_(self._is_done(), non_blocking=True)
        # Without an argument, the event would belong to the current device, which may be another one: it would pass at
        # once, and the host could run ahead by any number of steps.
        self._events[slot].record(torch.cuda.current_stream(self._device))
        self._steps += 1
        return False
