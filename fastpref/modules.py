"""The losses as modules: hyper-parameters at construction, tensors at every step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from . import dispatch, losses
from .scalars import unexpected


class PairLossModule(nn.Module):
    """A loss of this package as an nn.Module.

    ``DPOLoss(beta=2000.0)(model_pred, target, ref_pred)`` is ``dpo_loss(model_pred, target,
    ref_pred, beta=2000.0)``. Whatever is not a tensor of the step may be given at construction, and
    again in a call, which then goes before.
    """

    function: ClassVar[Callable[..., dispatch.LossOutput]]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        known = [*inspect.signature(type(self).function).parameters][:-1]
        known += dispatch.Knobs.__annotations__
        if unknown := sorted(options.keys() - set(known)):
            raise TypeError(unexpected(type(self).__name__, unknown, known))

    def forward(self, *tensors: Any, **options: Any) -> dispatch.LossOutput:
        return type(self).function(*tensors, **{**self.options, **options})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class MaPOLoss(PairLossModule):
    """`mapo_loss` as a module."""

    function = losses.mapo_loss


class DPOLoss(PairLossModule):
    """`dpo_loss` as a module."""

    function = losses.dpo_loss


class SmPOLoss(PairLossModule):
    """`smpo_loss` as a module."""

    function = losses.smpo_loss


class DMPOLoss(PairLossModule):
    """`dmpo_loss` as a module."""

    function = losses.dmpo_loss


class CaPOLoss(PairLossModule):
    """`capo_loss` as a module."""

    function = losses.capo_loss


class SePPOLoss(PairLossModule):
    """`seppo_loss` as a module."""

    function = losses.seppo_loss


class NPOLoss(PairLossModule):
    """`npo_loss` as a module."""

    function = losses.npo_loss


class BudgetDPOLoss(PairLossModule):
    """`budget_dpo_loss` as a module."""

    function = losses.budget_dpo_loss


class SimPOLoss(PairLossModule):
    """`simpo_loss` as a module."""

    function = losses.simpo_loss


class ORPOLoss(PairLossModule):
    """`orpo_loss` as a module."""

    function = losses.orpo_loss


class PSOLoss(PairLossModule):
    """`pso_loss` as a module."""

    function = losses.pso_loss


class SFTLoss(PairLossModule):
    """`sft_loss` as a module."""

    function = losses.sft_loss


class SelfNPOLoss(PairLossModule):
    """`self_npo_loss` as a module."""

    function = losses.self_npo_loss
