"""A sampler's step as a Gaussian around something linear in the prediction: samples,
log-probabilities, their ratios, and KL divergences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .context import onto

Kind = Literal["x", "v", "gaussian", "published"]
Reduction = Literal["mean", "sum"]
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Transition(NamedTuple):
    """One step of a sampler, x' = a * x + b * pred + std * z with z ~ N(0, 1), for each sample.

    a, b, std, dt, weight: fp32, each (B,), or () for one step of a whole batch, of any size.
    std: of the step's noise. Where it is 0 there is no density, and such a sample has the value 0
        and the gradient 0 in all that is computed here but `sample`.
    dt: the length of the step, sigma - sigma' > 0, of flow samplers; 1 of the others.
    weight: of the squared distance from the mean in the log-probability: 1 / (2 std^2), or 1 for
        CPS as published; 0 where std is 0.
    normalized: whether the log-probability includes -log(std) - log(2 pi) / 2. It cancels in every
        ratio.

    The methods take x, x_next and predictions of one shape, (B, ...) from two dimensions on, in any
    floating dtypes, and compute in fp32, or in fp64 if one of them is fp64. Gradients go to `pred`
    alone: trajectories and the predictions of others are taken as data. They wait for no device.

    Raises: TypeError, ValueError; naming the argument, what came and what is needed.
    """

    a: Tensor
    b: Tensor
    std: Tensor
    dt: Tensor
    weight: Tensor
    normalized: bool = True

    def sample(
        self,
        x: Tensor,
        pred: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """x' = a * x + b * pred + std * z, (B, ...), rounded to the dtype in which it is stored.

        Go on sampling with what this returns, and store it as it is: then log-probabilities taken
        of it later are those of what was sampled, and the ratio at the first update is exactly 1.
        (The published codes take them before rounding.)

        Args:
            generator: of z, on x's device or on the CPU, which draws it there; or a sequence of
                one for each sample, whose draws do not depend on the batch.
            dtype: of the result; by default x's.

        z is drawn in fp32 (fp64 for fp64 input), where diffusers draws in the prediction's dtype.
        """
        work = self._check(x=x, pred=pred)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype is {dtype}; expected a floating torch.dtype")
        a, b, std = (_spread(field, x, work) for field in (self.a, self.b, self.std))
        made = a * x.to(work) + b * pred.to(work) + std * _draw(x, work, generator)
        return made.to(x.dtype if dtype is None else dtype)

    def log_prob(
        self, x: Tensor, pred: Tensor, x_next: Tensor, *, reduction: Reduction = "mean"
    ) -> Tensor:
        """The log-probability of x_next, (B,): the mean over a sample's elements of

        ::

            -weight * (x_next - a * x - b * pred)^2  [ - log(std) - log(2 pi) / 2 ]

        with reduction="sum" their sum, whose ratios are unusable for latents of any usual size:
        1.01^16384 overflows. A difference of two is exactly 0 for equal predictions, but has the
        rounding error of both: see `log_ratio`.

        Source: sd3_sde_with_logprob.py of github.com/yifan123/flow_grpo, commit 54809b5f;
        ddim_with_logprob_sdpo.py of github.com/ZiyiZhang27/sdpo, commit 2074bbde.
        """
        work = self._check(x=x, pred=pred, x_next=x_next)
        error = self._residual(x, x_next, work) - self._live(self.b, x, work) * pred.to(work)
        value = -self._live(self.weight, None, work) * _total(error.square(), reduction)
        if not self.normalized:
            return value
        dead = self.std == 0
        constant = self.std.to(work).masked_fill(dead, 1.0).log() + HALF_LOG_2PI
        count = math.prod(x.shape[1:]) if reduction == "sum" else 1
        return value - count * constant.masked_fill(dead, 0.0)

    def log_ratio(
        self,
        x: Tensor,
        pred: Tensor,
        old_pred: Tensor,
        x_next: Tensor,
        *,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """log_prob(pred) - log_prob(old_pred) as a product, (B,): the mean over elements of

        ::

            -weight * b^2 * (pred - old_pred) * (pred + old_pred - 2 * (x_next - a * x) / b)

        The difference of two log-probabilities is off by up to 2e-7 in fp32: a tenth of the clip of
        GRPO-Guard, and more than a small log-ratio itself. The product is off by some 1e-6 of
        itself, and is exactly 0 where the predictions are equal.
        """
        work = self._check(x=x, pred=pred, old_pred=old_pred, x_next=x_next)
        old, b = old_pred.detach().to(work), self._live(self.b, x, work)
        moved = pred.to(work) - old
        error = self._residual(x, x_next, work) - b * old  # std * z, of what the old policy drew
        total = _total(moved * (2 * error - b * moved), reduction)
        scale = self._live(self.weight, None, work) * self._live(self.b, None, work)
        return scale * total + 0.0  # no -0

    def kl(self, pred: Tensor, ref_pred: Tensor, kind: Kind = "v") -> Tensor:
        """The divergence of the step from a reference's, (B,): kl_weight(kind) * mean(d^2) with
        d = pred - ref_pred. The x that both start from cancels. For kinds see `kl_weight`."""
        work = self._check(pred=pred, ref_pred=ref_pred)
        moved = pred.to(work) - ref_pred.detach().to(work)
        return self.kl_weight(kind).to(work) * _total(moved.square(), "mean")

    def kl_weight(self, kind: Kind = "v") -> Tensor:
        """What multiplies the mean squared difference of two predictions in `kl`; () or (B,).

        - "x": b^2, of the means: mean((mu - mu_ref)^2).
        - "v": 1, of the predictions. Neither this nor "x" has the denominator that makes the others
          large where steps have little noise.
        - "gaussian": b^2 / (2 std^2), the KL divergence of the two Gaussians, a mean over elements.
        - "published": as Flow-GRPO's code has it, mean((mu - mu_ref)^2) / (2 g^2). Its g is that
          of the SDE, std = g * sqrt(dt): "gaussian" times dt, and no KL divergence. For CPS
          (normalized=False) its g is std, so there it is "gaussian".

        0 where std is 0. Source: scripts/train_sd3.py of github.com/yifan123/flow_grpo for the
        last, and github.com/X-GenGroup/Flow-Factory for "x" and "v".
        """
        if kind not in get_args(Kind):
            known = ", ".join(map(repr, get_args(Kind)))
            raise ValueError(f"kind is {kind!r}; expected one of {known}")
        half, dt, b, std = self.kl_factors(kind)
        return torch.where(self.std == 0, 0.0, half * dt * (b / std) ** 2)

    def kl_factors(self, kind: Kind) -> tuple[float | Tensor, ...]:
        """(half, dt, b, std), of which `kl_weight` is half * dt * (b / std)^2: 1 where a kind has
        none of it."""
        gaussian = kind in ("gaussian", "published")
        by_dt = kind == "published" and self.normalized  # CPS has std in place of g
        return (
            0.5 if gaussian else 1.0,
            self.dt if by_dt else 1.0,
            1.0 if kind == "v" else self.b,
            self.std if gaussian else 1.0,
        )

    def to(self, device: torch.device | str) -> Transition:
        """With its tensors on `device`."""
        return self._each(lambda field: field.to(device=device))

    def select(self, index: int | slice | Tensor | Sequence[int]) -> Transition:
        """The steps of some samples, as indexing a tensor's rows does. What is () is one for any
        sample, and stays as it is."""
        rows = list(index) if isinstance(index, Sequence) else index
        return self._each(lambda field: field[rows] if field.dim() else field)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Transition:
        a, b, std, dt, weight = map(change, self[:5])
        return Transition(a, b, std, dt, weight, self.normalized)

    def _residual(self, x: Tensor, x_next: Tensor, work: torch.dtype) -> Tensor:
        return x_next.detach().to(work) - self._live(self.a, x, work) * x.detach().to(work)

    def _live(self, field: Tensor, x: Tensor | None, work: torch.dtype) -> Tensor:
        """A field with 0 where std is 0, whatever it is there, shaped to multiply x if given."""
        live = field.masked_fill(self.std == 0, 0.0)
        return live.to(work) if x is None else _spread(live, x, work)

    def _check(self, **tensors: Tensor) -> torch.dtype:
        """The dtype to compute in."""
        (first, like), *rest = tensors.items()
        for name, value in tensors.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got a {type(value).__name__}")
            if not value.is_floating_point():
                raise TypeError(f"{name} has dtype {value.dtype}; expected a floating dtype")
        for name, value in rest:
            if value.shape != like.shape or value.device != like.device:
                raise ValueError(
                    f"{name} is {tuple(value.shape)} on {value.device}, but {first} is "
                    f"{tuple(like.shape)} on {like.device}; expected the same shape and device"
                )
        if like.dim() < 2 or 0 in like.shape[1:]:
            raise ValueError(
                f"{first} has shape {tuple(like.shape)}; expected (samples, ...), from two "
                "dimensions and one element a sample"
            )
        if self.std.dim() and self.std.shape[0] != like.shape[0]:
            raise ValueError(
                f"{first} has shape {tuple(like.shape)}; expected ({self.std.shape[0]}, ...), the "
                "samples that this transition is of"
            )
        check_device(self, first, like.device)
        double = any(value.dtype == torch.float64 for value in tensors.values())
        return torch.float64 if double else torch.float32


def check_device(transition: Transition, name: str, device: torch.device) -> None:
    """Raises: ValueError, for one that cannot be used with the argument `name`, which is on
    `device`. Numbers of a whole batch may be on the CPU."""
    for field in transition[:5]:
        if field.device != device and (field.dim() or field.device.type != "cpu"):
            raise ValueError(
                f"{name} is on {device}, but the transition is on {field.device}; expected one "
                f"device: transition.to({str(device)!r})"
            )


def _spread(field: Tensor, x: Tensor, work: torch.dtype) -> Tensor:
    field = field.to(work)
    return field if field.dim() == 0 else field.reshape(-1, *[1] * (x.dim() - 1))


def _total(values: Tensor, reduction: str) -> Tensor:
    if reduction not in get_args(Reduction):
        raise ValueError(f'reduction is {reduction!r}; expected "mean" or "sum"')
    dims = tuple(range(1, values.dim()))
    return values.sum(dims) if reduction == "sum" else values.mean(dims)


def _draw(
    x: Tensor,
    work: torch.dtype,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> Tensor:
    if generator is None:
        return torch.randn(x.shape, device=x.device, dtype=work)
    many = isinstance(generator, Sequence)
    generators = list(generator) if isinstance(generator, Sequence) else [generator]
    for one in generators:
        if not isinstance(one, torch.Generator):
            raise TypeError(
                "generator must be a torch.Generator or a sequence of them, got a "
                f"{type(one).__name__}"
            )
        if one.device.type not in ("cpu", x.device.type):
            raise ValueError(f"generator is on {one.device}; expected {x.device}, x's, or cpu")
    if many and len(generators) != len(x):
        raise ValueError(
            f"generator has {len(generators)} generators; expected one for each of {len(x)} samples"
        )
    shape = x.shape[1:] if many else x.shape
    drawn = [torch.randn(shape, generator=g, device=g.device, dtype=work) for g in generators]
    return onto(x.device, torch.stack(drawn) if many else drawn[0])
