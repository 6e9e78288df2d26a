"""The losses as modules: hyper-parameters at construction, tensors at every step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from . import losses
from .batch import Halves, Scalar
from .conventions import DPOLossType
from .dispatch import (
    ErrorReduction,
    Knobs,
    MissingReference,
    OneSidedKnobs,
    OwnErrorKnobs,
    SignedKnobs,
    SwappedKnobs,
    UnsmoothedKnobs,
)
from .grouped import GroupKnobs, SquaresKnobs, SummedGroupKnobs
from .losses.samples import KTOUtility
from .losses.steps import GRPOVariant, KLUnit
from .outputs import ForwardOutput, LossOutput, SampleOutput, StepOutput
from .scalars import unexpected
from .stepwise import PairStepKnobs, StepKnobs
from .transitions import Transition

# Tensors that change with every step.
STEP = (
    "model_pred", "target", "ref_pred", "ref_mse", "label", "real", "score", "lengths", "old_pred",
    "x", "x_next", "transition", "advantage", "reward", "t", "old_log_prob", "ref_log_prob",
)  # fmt: skip


class LossModule(nn.Module):
    """A loss of this package as an nn.Module.

    ``DPOLoss(beta=2000.0)(model_pred, target, ref_pred)`` is ``dpo_loss(model_pred, target,
    ref_pred, beta=2000.0)``. Whatever is not a tensor of the step may be given at construction, and
    again in a call, which then goes before. Construction refuses what every call would refuse.
    """

    function: ClassVar[Callable[..., Any]]
    knobs: ClassVar[type]  # the TypedDict of what the function takes as **knobs

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = self._known()
        if unknown := [name for name in options if name not in known]:
            raise TypeError(unexpected(type(self).__name__, unknown, [*known]))
        self.options = {
            name: value
            for name, value in options.items()
            if isinstance(value, Tensor) or value != known[name]
        }
        self._order = positional_of(type(self).function)
        self._try()

    @classmethod
    def _known(cls) -> dict[str, Any]:
        """What the function takes besides the tensors of the step, with its defaults."""
        parameters = inspect.signature(cls.function).parameters
        own = {name: p.default for name, p in parameters.items() if name not in (*STEP, "knobs")}
        return own | dict.fromkeys(cls.knobs.__annotations__, inspect.Parameter.empty)

    def _try(self) -> None:
        """Ask the function, with a batch of zeros, whether it takes the options."""
        function, options = type(self).function, dict(self.options)
        if options.get("impl") in ("auto", "triton"):  # it may run on another machine than this
            options["impl"] = "torch"
        for name in ("mask", "huber_c"):  # their shape may be that of the step
            if isinstance(options.get(name), Tensor | tuple | list):
                del options[name]
        flat = [
            v
            for value in options.values()
            for v in (value if isinstance(value, tuple | list) else [value])
        ]
        tensors = [value for value in flat if isinstance(value, Tensor)]
        n_groups = min((len(value) for value in tensors if value.dim()), default=1)
        device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
        step = zeros_of(function, n_groups, device)
        if options.get("paired") is False:
            step["model_pred"] = step["target"]
        try:
            function(**{**step, **options})
        except MissingReference:
            function(**{**step, "ref_pred": step["model_pred"], **options})

    def forward(self, *tensors: Any, **options: Any) -> Any:
        again = self._order[: len(tensors)]
        rest = {name: value for name, value in self.options.items() if name not in again}
        return type(self).function(*tensors, **{**rest, **options})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def zeros_of(
    function: Callable[..., Any], n_groups: int = 1, device: torch.device | None = None
) -> dict[str, Any]:
    """A batch of zeros that a loss takes, without a reference: pairs, samples, or lists of two."""
    if function.__module__ == losses.steps.__name__:
        return _zeros_of_steps(function, n_groups, device)
    members = 1 if function.__module__ == losses.samples.__name__ else 2
    target = torch.zeros(n_groups, 1, device=device)
    step: dict[str, Any] = {"model_pred": target.repeat(members, 1), "target": target}
    for name in (name for name in positional_of(function) if name in ("label", "real", "score")):
        step[name] = torch.zeros(n_groups, 2, device=device)
        if members == 1:
            step[name] = step[name][:, 0]
    return step | dict.fromkeys(needed_of(function), 0.5)


def _zeros_of_steps(
    function: Callable[..., Any], n_groups: int, device: torch.device | None
) -> dict[str, Any]:
    """Steps with noise of 1, or two of them for each group."""
    of_pairs = "PairStepKnobs" in inspect.signature(function).parameters["knobs"].annotation
    latents = torch.zeros(n_groups * (2 if of_pairs else 1), 1, device=device)
    others = {
        "transition": Transition(*torch.ones(5, device=device)),
        "advantage": latents[:, 0],
        "reward": latents[:, 0],
    }
    return {name: others.get(name, latents) for name in positional_of(function)}


def positional_of(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def needed_of(function: Callable[..., Any]) -> list[str]:
    """Numbers without a default, which come with the step."""
    parameters = inspect.signature(function).parameters
    names = (name for name in positional_of(function) if name not in STEP)
    return [name for name in names if parameters[name].default is None]


# What follows is written by tests/helpers/derived.py, from the functions in losses/.


class MaPOLoss(LossModule):
    """`mapo_loss` as a module."""

    function = losses.mapo_loss
    knobs = Knobs

    def __init__(
        self,
        *,
        beta: Scalar = 0.1,
        snr: Scalar = 0.5,
        num_train_timesteps: Scalar = 1000,
        **knobs: Unpack[Knobs],
    ) -> None:
        super().__init__(
            beta=beta,
            snr=snr,
            num_train_timesteps=num_train_timesteps,
            **knobs,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            model_pred: Halves,
            target: Halves,
            **options: Any,
        ) -> LossOutput: ...


class DPOLoss(LossModule):
    """`dpo_loss` as a module."""

    function = losses.dpo_loss
    knobs = UnsmoothedKnobs

    def __init__(
        self,
        *,
        beta: Scalar = 5000.0,
        loss_type: DPOLossType = "sigmoid",
        label_smoothing: Scalar = 0.0,
        alpha: Scalar | None = None,
        **knobs: Unpack[UnsmoothedKnobs],
    ) -> None:
        super().__init__(
            beta=beta,
            loss_type=loss_type,
            label_smoothing=label_smoothing,
            alpha=alpha,
            **knobs,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            model_pred: Halves,
            target: Halves,
            ref_pred: Halves | None = None,
            *,
            ref_mse: Halves | None = None,
            **options: Any,
        ) -> LossOutput: ...


class SmPOLoss(LossModule):
    """`smpo_loss` as a module."""

    function = losses.smpo_loss
    knobs = Knobs

    def __init__(
        self,
        *,
        prob: Scalar | None = None,
        beta: Scalar = 5000.0,
        gamma: Scalar = 10.0,
        **knobs: Unpack[Knobs],
    ) -> None:
        super().__init__(
            prob=prob,
            beta=beta,
            gamma=gamma,
            **knobs,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            model_pred: Halves,
            target: Halves,
            ref_pred: Halves | None = None,
            prob: Scalar | None = None,
            *,
            ref_mse: Halves | None = None,
            **options: Any,
        ) -> LossOutput: ...


class DMPOLoss(LossModule):
    """`dmpo_loss` as a module."""

    function = losses.dmpo_loss
    knobs = Knobs

    def __init__(
        self,
        *,
        beta: Scalar = 6000.0,
        alpha: Scalar = 0.01,
        **knobs: Unpack[Knobs],
    ) -> None:
        super().__init__(
            beta=beta,
            alpha=alpha,
            **knobs,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            model_pred: Halves,
            target: Halves,
            ref_pred: Halves | None = None,
            *,
            ref_mse: Halves | None = None,
            **options: Any,
        ) -> LossOutput: ...


class CaPOLoss(LossModule):
    """`capo_loss` as a module."""

    function = losses.capo_loss
    knobs = Knobs

    def __init__(
        self,
        *,
        delta: Scalar | None = None,
        beta: Scalar = 2500.0,
        **knobs: Unpack[Knobs],
    ) -> None:
        super().__init__(
            delta=delta,
            beta=beta,
            **knobs,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            model_pred: Halves,
            target: Halves,
            ref_pred: Halves | None = None,
            delta: Scalar | None = None,
            *,
            ref_mse: Halves | None = None,
            **options: Any,
        ) -> LossOutput: ...


class SePPOLoss(LossModule):
    """`seppo_loss` as a module."""

    function = losses.seppo_loss
    knobs = SignedKnobs

    def __init__(
        self,
        *,
        sign: Scalar = 1.0,
        beta: Scalar = 2500.0,
        **knobs: Unpack[SignedKnobs],
    ) -> None:
        super().__init__(
            sign=sign,
            beta=beta,
            **knobs,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            model_pred: Halves,
            target: Halves,
            ref_pred: Halves | None = None,
            sign: Scalar = 1.0,
            *,
            ref_mse: Halves | None = None,
            **options: Any,
        ) -> LossOutput: ...


class NPOLoss(LossModule):
    """`npo_loss` as a module."""

    function = losses.npo_loss
    knobs = SwappedKnobs

    def __init__(
        self,
        *,
        beta: Scalar = 2000.0,
        loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid",
        **knobs: Unpack[SwappedKnobs],
    ) -> None:
        super().__init__(
            beta=beta,
            loss_type=loss_type,
            **knobs,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            model_pred: Halves,
            target: Halves,
            ref_pred: Halves | None = None,
            *,
            ref_mse: Halves | None = None,
            **options: Any,
        ) -> LossOutput: ...


class BudgetDPOLoss(LossModule):
    """`budget_dpo_loss` as a module."""

    function = losses.budget_dpo_loss
    knobs = Knobs

    def __init__(
        self,
        *,
        beta: Scalar = 5000.0,
        budget: Scalar = 0.0,
        budget_weight: Scalar = 1.0,
        **knobs: Unpack[Knobs],
    ) -> None:
        super().__init__(
            beta=beta,
            budget=budget,
            budget_weight=budget_weight,
            **knobs,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            model_pred: Halves,
            target: Halves,
            ref_pred: Halves | None = None,
            *,
            ref_mse: Halves | None = None,
            **options: Any,
        ) -> LossOutput: ...


class LinearDPOLoss(LossModule):
    """`linear_dpo_loss` as a module."""

    function = losses.linear_dpo_loss
    knobs = Knobs

    def __init__(
        self,
        *,
        beta: Scalar = 500.0,
        eta: Scalar = 0.0,
        **knobs: Unpack[Knobs],
    ) -> None:
        super().__init__(
            beta=beta,
            eta=eta,
            **knobs,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            model_pred: Halves,
            target: Halves,
            ref_pred: Halves | None = None,
            *,
            ref_mse: Halves | None = None,
            **options: Any,
        ) -> LossOutput: ...


class DiffusionDROLoss(LossModule):
    """`diffusion_dro_loss` as a module."""

    function = losses.diffusion_dro_loss
    knobs = Knobs

    def __init__(
        self,
        *,
        target_margin: Scalar = 0.001,
        **knobs: Unpack[Knobs],
    ) -> None:
        super().__init__(
            target_margin=target_margin,
            **knobs,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            model_pred: Halves,
            target: Halves,
            ref_pred: Halves | None = None,
            *,
            ref_mse: Halves | None = None,
            **options: Any,
        ) -> LossOutput: ...


class DSPOLoss(LossModule):
    """`dspo_loss` as a module."""

    function = losses.dspo_loss
    knobs = SquaresKnobs

    def __init__(
        self,
        *,
        beta: Scalar = 0.001,
        **knobs: Unpack[SquaresKnobs],
    ) -> None:
        super().__init__(
            beta=beta,
            **knobs,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            model_pred: Halves,
            target: Halves,
            ref_pred: Halves | None = None,
            **options: Any,
        ) -> LossOutput: ...


class SimPOLoss(LossModule):
    """`simpo_loss` as a module."""

    function = losses.simpo_loss
    knobs = Knobs

    def __init__(
        self,
        *,
        beta: Scalar = 250.0,
        gamma: Scalar = 0.5,
        **knobs: Unpack[Knobs],
    ) -> None:
        super().__init__(
            beta=beta,
            gamma=gamma,
            **knobs,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            model_pred: Halves,
            target: Halves,
            **options: Any,
        ) -> LossOutput: ...


class ORPOLoss(LossModule):
    """`orpo_loss` as a module."""

    function = losses.orpo_loss
    knobs = Knobs

    def __init__(
        self,
        *,
        beta: Scalar = 0.1,
        **knobs: Unpack[Knobs],
    ) -> None:
        super().__init__(
            beta=beta,
            **knobs,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            model_pred: Halves,
            target: Halves,
            **options: Any,
        ) -> LossOutput: ...


class PSOLoss(LossModule):
    """`pso_loss` as a module."""

    function = losses.pso_loss
    knobs = OneSidedKnobs

    def __init__(
        self,
        *,
        beta: Scalar | None = None,
        loss_type: Literal["hinge", "sigmoid"] = "hinge",
        loser_weight: Scalar = 0.1,
        prior_weight: Scalar = 0.5,
        **knobs: Unpack[OneSidedKnobs],
    ) -> None:
        super().__init__(
            beta=beta,
            loss_type=loss_type,
            loser_weight=loser_weight,
            prior_weight=prior_weight,
            **knobs,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            model_pred: Halves,
            target: Halves,
            ref_pred: Halves | None = None,
            *,
            ref_mse: Halves | None = None,
            **options: Any,
        ) -> LossOutput: ...


class SFTLoss(LossModule):
    """`sft_loss` as a module."""

    function = losses.sft_loss
    knobs = Knobs

    def __init__(
        self,
        *,
        paired: bool | None = None,
        **knobs: Unpack[Knobs],
    ) -> None:
        super().__init__(
            paired=paired,
            **knobs,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            model_pred: Halves,
            target: Halves,
            **options: Any,
        ) -> LossOutput: ...


class SelfNPOLoss(LossModule):
    """`self_npo_loss` as a module."""

    function = losses.self_npo_loss
    knobs = OwnErrorKnobs

    def __init__(
        self,
        *,
        paired: bool | None = None,
        huber_c: Scalar | None = 0.001,
        **knobs: Unpack[OwnErrorKnobs],
    ) -> None:
        super().__init__(
            paired=paired,
            huber_c=huber_c,
            **knobs,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            model_pred: Halves,
            target: Halves,
            **options: Any,
        ) -> LossOutput: ...


class KTOLoss(LossModule):
    """`kto_loss` as a module."""

    function = losses.kto_loss
    knobs = GroupKnobs

    def __init__(
        self,
        *,
        beta: Scalar = 1000.0,
        lambda_desirable: Scalar = 1.0,
        lambda_undesirable: Scalar = 1.0,
        utility: KTOUtility = "kto",
        kl: Scalar | None = None,
        **knobs: Unpack[GroupKnobs],
    ) -> None:
        super().__init__(
            beta=beta,
            lambda_desirable=lambda_desirable,
            lambda_undesirable=lambda_undesirable,
            utility=utility,
            kl=kl,
            **knobs,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            model_pred: Tensor,
            target: Tensor,
            ref_pred: Tensor | None = None,
            label: Tensor | None = None,
            *,
            ref_mse: Tensor | None = None,
            **options: Any,
        ) -> SampleOutput: ...


class DDOLoss(LossModule):
    """`ddo_loss` as a module."""

    function = losses.ddo_loss
    knobs = SummedGroupKnobs

    def __init__(
        self,
        *,
        beta: Scalar = 0.05,
        alpha: Scalar = 4.0,
        error_reduction: ErrorReduction = "sum",
        **knobs: Unpack[SummedGroupKnobs],
    ) -> None:
        super().__init__(
            beta=beta,
            alpha=alpha,
            error_reduction=error_reduction,
            **knobs,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            model_pred: Tensor,
            target: Tensor,
            ref_pred: Tensor | None = None,
            real: Tensor | None = None,
            *,
            ref_mse: Tensor | None = None,
            **options: Any,
        ) -> SampleOutput: ...


class TGOLoss(LossModule):
    """`tgo_loss` as a module."""

    function = losses.tgo_loss
    knobs = GroupKnobs

    def __init__(
        self,
        *,
        threshold: Scalar | None = None,
        beta: Scalar = 1000.0,
        confidence: Scalar = 5.0,
        **knobs: Unpack[GroupKnobs],
    ) -> None:
        super().__init__(
            threshold=threshold,
            beta=beta,
            confidence=confidence,
            **knobs,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            model_pred: Tensor,
            target: Tensor,
            ref_pred: Tensor | None = None,
            score: Tensor | None = None,
            threshold: Scalar | None = None,
            *,
            ref_mse: Tensor | None = None,
            **options: Any,
        ) -> SampleOutput: ...


class RankDPOLoss(LossModule):
    """`rankdpo_loss` as a module."""

    function = losses.rankdpo_loss
    knobs = GroupKnobs

    def __init__(
        self,
        *,
        beta: Scalar = 5000.0,
        **knobs: Unpack[GroupKnobs],
    ) -> None:
        super().__init__(
            beta=beta,
            **knobs,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            model_pred: Tensor,
            target: Tensor,
            ref_pred: Tensor | None = None,
            score: Tensor | None = None,
            *,
            ref_mse: Tensor | None = None,
            lengths: Tensor | None = None,
            **options: Any,
        ) -> SampleOutput: ...


class PlackettLuceLoss(LossModule):
    """`plackett_luce_loss` as a module."""

    function = losses.plackett_luce_loss
    knobs = GroupKnobs

    def __init__(
        self,
        *,
        beta: Scalar = 2500.0,
        **knobs: Unpack[GroupKnobs],
    ) -> None:
        super().__init__(
            beta=beta,
            **knobs,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            model_pred: Tensor,
            target: Tensor,
            ref_pred: Tensor | None = None,
            score: Tensor | None = None,
            *,
            ref_mse: Tensor | None = None,
            lengths: Tensor | None = None,
            **options: Any,
        ) -> SampleOutput: ...


class GRPOLoss(LossModule):
    """`grpo_loss` as a module."""

    function = losses.grpo_loss
    knobs = StepKnobs

    def __init__(
        self,
        *,
        clip_range: Scalar = 0.0001,
        clip_range_high: Scalar | None = None,
        advantage_clip: Scalar | None = 5.0,
        kl_weight: Scalar = 0.0,
        kl: KLUnit = "v",
        variant: GRPOVariant = "clip",
        divergence_limit: Scalar = 1e-05,
        **knobs: Unpack[StepKnobs],
    ) -> None:
        super().__init__(
            clip_range=clip_range,
            clip_range_high=clip_range_high,
            advantage_clip=advantage_clip,
            kl_weight=kl_weight,
            kl=kl,
            variant=variant,
            divergence_limit=divergence_limit,
            **knobs,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            model_pred: Tensor,
            old_pred: Tensor | None,
            x: Tensor,
            x_next: Tensor,
            transition: Transition,
            advantage: Scalar,
            *,
            old_log_prob: Tensor | None = None,
            ref_pred: Tensor | None = None,
            **options: Any,
        ) -> StepOutput: ...


class StepDPOLoss(LossModule):
    """`step_dpo_loss` as a module."""

    function = losses.step_dpo_loss
    knobs = PairStepKnobs

    def __init__(
        self,
        *,
        beta: Scalar,
        clip: Scalar | None = 0.1,
        **knobs: Unpack[PairStepKnobs],
    ) -> None:
        super().__init__(
            beta=beta,
            clip=clip,
            **knobs,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            model_pred: Halves,
            ref_pred: Halves | None,
            x: Halves,
            x_next: Halves,
            transition: Transition,
            *,
            ref_log_prob: Halves | None = None,
            **options: Any,
        ) -> StepOutput: ...


class SDPOLoss(LossModule):
    """`sdpo_loss` as a module."""

    function = losses.sdpo_loss
    knobs = PairStepKnobs

    def __init__(
        self,
        *,
        step_weight: Scalar = 1.0,
        clip_range: Scalar = 0.0001,
        advantage_clip: Scalar | None = 5.0,
        **knobs: Unpack[PairStepKnobs],
    ) -> None:
        super().__init__(
            step_weight=step_weight,
            clip_range=clip_range,
            advantage_clip=advantage_clip,
            **knobs,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            model_pred: Halves,
            old_pred: Halves | None,
            x: Halves,
            x_next: Halves,
            transition: Transition,
            advantage: Tensor | tuple[Scalar, Scalar],
            *,
            old_log_prob: Halves | None = None,
            **options: Any,
        ) -> StepOutput: ...


class NFTLoss(LossModule):
    """`nft_loss` as a module."""

    function = losses.nft_loss
    knobs = StepKnobs

    def __init__(
        self,
        *,
        beta: Scalar = 1.0,
        adaptive: bool = True,
        kl_weight: Scalar = 0.0,
        **knobs: Unpack[StepKnobs],
    ) -> None:
        super().__init__(
            beta=beta,
            adaptive=adaptive,
            kl_weight=kl_weight,
            **knobs,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            model_pred: Tensor,
            target: Tensor,
            old_pred: Tensor,
            reward: Scalar,
            *,
            t: Scalar | None = None,
            ref_pred: Tensor | None = None,
            **options: Any,
        ) -> ForwardOutput: ...


__all__ = [
    "BudgetDPOLoss",
    "CaPOLoss",
    "DDOLoss",
    "DMPOLoss",
    "DPOLoss",
    "DSPOLoss",
    "DiffusionDROLoss",
    "GRPOLoss",
    "KTOLoss",
    "LinearDPOLoss",
    "MaPOLoss",
    "NFTLoss",
    "NPOLoss",
    "ORPOLoss",
    "PSOLoss",
    "PlackettLuceLoss",
    "RankDPOLoss",
    "SDPOLoss",
    "SFTLoss",
    "SePPOLoss",
    "SelfNPOLoss",
    "SimPOLoss",
    "SmPOLoss",
    "StepDPOLoss",
    "TGOLoss",
]
