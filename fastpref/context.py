"""What surrounds a call: function transforms, dispatch modes, and autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad


@torch.compiler.assume_constant_result
def _inside_torch_func() -> bool:
    # Dynamo enters torch.func's levels while it traces, so the answer holds for what it compiles.
    return _functorch.peek_interpreter_stack() is not None


def transformed() -> bool:
    """Whether torch.func (grad, vjp, jvp, vmap, ...) or forward-mode AD is active. Both need every
    operation to be PyTorch's own, and their tensors hide values and pointers."""
    return forward_ad._current_level >= 0 or _inside_torch_func()


def intercepted(*tensors: Tensor | None) -> bool:
    """Whether operations on these tensors go to Python first (FakeTensor, make_fx, a dispatch
    mode), which a kernel launched directly would bypass."""
    if torch._C._len_torch_dispatch_stack() > 0:
        return True
    if {*map(type, tensors)} <= _PLAIN:
        return False
    plain = torch._C._disabled_torch_dispatch_impl
    return any(getattr(t, "__torch_dispatch__", plain) is not plain for t in tensors)


def readable(value: Tensor) -> bool:
    """Whether values can be read without waiting for a device or leaving a trace."""
    return (
        value.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not transformed()
        and not intercepted(value)
    )


_PLAIN = {Tensor, type(None)}


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Autocast turned off, on devices that have it (meta has not)."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
