"""What surrounds a call: function transforms, dispatch modes, and autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad


def _inside_torch_func() -> bool:
    return _functorch.peek_interpreter_stack() is not None


# Dynamo enters torch.func's levels while it traces, so the answer holds for what it compiles. This
# is what torch.compiler.assume_constant_result does, which would import all of Dynamo.
_inside_torch_func._dynamo_marked_constant = True  # type: ignore[attr-defined]


def transformed() -> bool:
    """Whether torch.func (grad, vjp, jvp, vmap, ...) or forward-mode AD is active. Both need every
    operation to be PyTorch's own, and their tensors hide values and pointers."""
    return forward_ad._current_level >= 0 or _inside_torch_func()


def intercepted(*tensors: Tensor | None) -> bool:
    """Whether operations on these tensors go to somebody else first (torch.compile, FakeTensor,
    make_fx, a dispatch mode), whom a kernel launched directly would bypass."""
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack() > 0:
        return True
    if not tensors:
        return False
    return not {*map(type, tensors)} <= _PLAIN and any(map(dispatches_itself, tensors))


def readable(value: Tensor) -> bool:
    """Whether values can be read without waiting for a device or leaving a trace."""
    return value.device.type == "cpu" and not intercepted(value) and not transformed()


def dispatches_itself(tensor: Tensor | None) -> bool:
    """Whether it is of a subclass that handles every operation in Python."""
    default = torch._C._disabled_torch_dispatch_impl
    return getattr(tensor, "__torch_dispatch__", default) is not default


_PLAIN = {Tensor, type(None)}


def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]  # 2.11 cannot trace it


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Autocast turned off, where it is on."""
    if _has_autocast(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def onto(device: torch.device, tensor: Tensor) -> Tensor:
    """The tensor on `device`; from the host, without waiting for what the device has yet to do."""
    if device.type == "cuda" and readable(tensor):  # torch.compile cannot trace pinning
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
