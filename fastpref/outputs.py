"""What the losses return."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from .context import readable


class LossOutput(NamedTuple):
    """What losses on pairs return, for B of them. Only `loss` carries a gradient: to add a term of
    your own, take it from your own errors (`losses_from_errors`), or use `sft_weight` and its kin.

    loss: (), or (B,) for reduction="none".
    mse_w, mse_l: (B,) mean squared error of the prediction, winner's and loser's.
    margin: (B,) logit of the preference; > 0 where the model prefers the winner.
    ref_mse_w, ref_mse_l: (B,) the reference model's errors; None for losses without a reference.
    drop_w, drop_l: (B,) policy error minus reference error, negative where the model improved, and
        None as above. With `ref_pred` they are summed from (model_pred - ref_pred) * (model_pred +
        ref_pred - 2 * target), and so are exact where mse_w - ref_mse_w has cancelled.
    """

    loss: Tensor
    mse_w: Tensor
    mse_l: Tensor
    margin: Tensor
    ref_mse_w: Tensor | None = None
    ref_mse_l: Tensor | None = None
    drop_w: Tensor | None = None
    drop_l: Tensor | None = None

    @overload
    def metrics(
        self, *, gather: bool = False, as_floats: Literal[False] = False
    ) -> dict[str, Tensor]: ...

    @overload
    def metrics(self, *, gather: bool = False, as_floats: Literal[True]) -> dict[str, float]: ...

    def metrics(
        self, *, gather: bool = False, as_floats: bool = False
    ) -> dict[str, Tensor] | dict[str, float]:
        """Training metrics: 0-d device tensors, with no host sync. All are means over pairs, except
        for the loss with reduction="sum", which is their sum.

        accuracy: share of pairs with margin > 0; a tie counts one half.
        gradient_factor: mean sigmoid(-margin). For losses that are softplus(-margin) it is the
            share of the preference gradient that is left: 1/2 for margins of 0, near 0 once pairs
            are won (or beta is too large), near 1 if they are lost. For others it says where the
            margins are.

        Args:
            gather: average over all processes of torch.distributed's default group, weighted by
                their numbers of pairs, the loss of reduction="sum" too, which is then no sum. All
                of them must call this. Without a group it does nothing.
            as_floats: return Python floats, for a progress bar. This waits for the device once.
        """
        values: dict[str, Tensor | None] = {
            "mse_w": self.mse_w,
            "mse_l": self.mse_l,
            "margin": self.margin,
        }
        names = ("ref_mse_w", "ref_mse_l", "drop_w", "drop_l")
        return _metrics(self.loss, values | {n: getattr(self, n) for n in names}, gather, as_floats)


class SampleOutput(NamedTuple):
    """What losses on samples and lists return, for B samples, or lists of k. Only `loss` carries a
    gradient.

    loss: (), or (B,) for reduction="none".
    errors: (B,), or (B, k), mean squared errors of the prediction.
    margin: (B,) logit of the preference; > 0 where the model has the sample on its right side, or
        the list, by the mean over its pairs, in its right order.
    ref_errors: the reference model's errors, shaped as errors.
    drops: policy error minus reference error, negative where the model improved; see `LossOutput`.
    lengths: (B,), of lists that were given some; what lies beyond is 0 in errors and drops.
    """

    loss: Tensor
    errors: Tensor
    margin: Tensor
    ref_errors: Tensor
    drops: Tensor
    lengths: Tensor | None = None

    @overload
    def metrics(
        self, *, gather: bool = False, as_floats: Literal[False] = False
    ) -> dict[str, Tensor]: ...

    @overload
    def metrics(self, *, gather: bool = False, as_floats: Literal[True]) -> dict[str, float]: ...

    def metrics(
        self, *, gather: bool = False, as_floats: bool = False
    ) -> dict[str, Tensor] | dict[str, float]:
        """As `LossOutput.metrics`: loss, error, margin, accuracy, gradient_factor, ref_error and
        drop. Means of errors and drops are over the rows that lists have."""
        values: dict[str, Tensor | None] = {"error": self.errors, "margin": self.margin}
        values |= {"ref_error": self.ref_errors, "drop": self.drops}
        if self.lengths is not None:
            per_row = self.errors.numel() / self.lengths.sum().clamp(min=1)
            for name in ("error", "ref_error", "drop"):
                values[name] = per_row * getattr(self, f"{name}s")
        return _metrics(self.loss, values, gather, as_floats)


class ForwardOutput(NamedTuple):
    """What losses on the forward process with an old policy return, for B samples. Only `loss`
    carries a gradient.

    loss: (), or (B,) for reduction="none".
    errors, old_errors: (B,) mean squared errors of the policy and the old one.
    drops: (B,) policy error minus the old policy's, negative where the model improved.
    drifts: (B,) mean((model_pred - old_pred)^2).
    margin: (B,) > 0 where the policy moved as the rewards say.
    kl: (B,) mean((model_pred - ref_pred)^2), where there is a reference.
    """

    loss: Tensor
    errors: Tensor
    old_errors: Tensor
    drops: Tensor
    drifts: Tensor
    margin: Tensor
    kl: Tensor | None = None

    @overload
    def metrics(
        self, *, gather: bool = False, as_floats: Literal[False] = False
    ) -> dict[str, Tensor]: ...

    @overload
    def metrics(self, *, gather: bool = False, as_floats: Literal[True]) -> dict[str, float]: ...

    def metrics(
        self, *, gather: bool = False, as_floats: bool = False
    ) -> dict[str, Tensor] | dict[str, float]:
        """The means of a batch, detached: loss, error, old_error, drop, drift, margin, accuracy
        (the share of margins above 0, ties counting half), and kl. gather, as_floats: as in
        `LossOutput.metrics`."""
        values: dict[str, Tensor | None] = {"error": self.errors, "old_error": self.old_errors}
        values |= {"drop": self.drops, "drift": self.drifts, "margin": self.margin, "kl": self.kl}
        return _metrics(self.loss, values, gather, as_floats, is_logit=False)


class StepOutput(NamedTuple):
    """What losses on a sampler's steps return, for B samples, or B pairs of them. Only `loss`
    carries a gradient.

    loss: (), or (B,) for reduction="none".
    log_ratio: (B,), of pairs (2B,) with the winners' first: log of the policy's probability of the
        step over that of the old policy or reference; GRPO-Guard's own log-ratio for "guard".
    clipped: shaped as log_ratio: 1 where the ratio is out of bounds, or the sample dropped, and so
        has no gradient (in `sdpo_loss` unless the square of the unclipped difference is larger).
    kl: (B,) divergence from a reference, where the loss has one.
    margin: (B,), of pairs; > 0 where the policy moved towards the better of the two.
    """

    loss: Tensor
    log_ratio: Tensor
    clipped: Tensor
    kl: Tensor | None = None
    margin: Tensor | None = None

    @overload
    def metrics(
        self, *, gather: bool = False, as_floats: Literal[False] = False
    ) -> dict[str, Tensor]: ...

    @overload
    def metrics(self, *, gather: bool = False, as_floats: Literal[True]) -> dict[str, float]: ...

    def metrics(
        self, *, gather: bool = False, as_floats: bool = False
    ) -> dict[str, Tensor] | dict[str, float]:
        """The means of a batch, detached: loss; ratio, its standard deviation ratio_std, and the
        farthest a ratio is from 1, ratio_off; clip_fraction; approx_kl, mean(log_ratio^2) / 2; and
        kl, margin and accuracy where there are such. gather, as_floats: as in
        `LossOutput.metrics`; gathered, ratio_std and ratio_off are means of the processes' own."""
        off = torch.expm1(self.log_ratio)
        metrics = {
            "loss": self.loss.detach().mean(),
            "ratio": 1.0 + off.mean(),
            "ratio_std": off.std(correction=0),
            "ratio_off": off.abs().amax(),
            "clip_fraction": self.clipped.mean(),
            "approx_kl": 0.5 * self.log_ratio.square().mean(),
        }
        if self.kl is not None:
            metrics["kl"] = self.kl.mean()
        if self.margin is not None:
            metrics["margin"] = self.margin.mean()
            metrics["accuracy"] = _accuracy(self.margin)
        return _averaged(metrics, len(self.log_ratio), gather, as_floats)

    def by_step(self, step: Tensor, n_steps: int) -> dict[str, Tensor]:
        """Means over the samples of each step of the sampler, (n_steps,) each, NaN where there are
        none: ratio, ratio_std, clip_fraction, approx_kl, and kl where there is one. Nothing waits
        for the device.

        step: (B,), or (2B,) of pairs, integers from 0 to n_steps - 1, on the output's device: at
            which step a sample, or a pair, is.

        Raises: ValueError; for steps out of range where they are on the CPU.
        """
        step = _steps_of(step, n_steps, self.log_ratio, self.margin is not None)

        def mean(values: Tensor) -> Tensor:
            at = step[: len(values)]
            total = values.new_zeros(n_steps).index_add(0, at, values)
            return total / values.new_zeros(n_steps).index_add(0, at, torch.ones_like(values))

        off = torch.expm1(self.log_ratio)
        mean_off = mean(off)
        found = {
            "ratio": 1.0 + mean_off,
            "ratio_std": mean((off - mean_off[step]).square()).sqrt(),
            "clip_fraction": mean(self.clipped),
            "approx_kl": 0.5 * mean(self.log_ratio.square()),
        }
        return found if self.kl is None else {**found, "kl": mean(self.kl)}


def _steps_of(step: Tensor, n_steps: int, like: Tensor, pairs: bool) -> Tensor:
    """Of each row, where pairs may share theirs."""
    rows = len(like)
    integers = isinstance(step, Tensor) and not (
        step.is_floating_point() or step.is_complex() or step.dtype == torch.bool
    )
    lengths = (rows // 2, rows) if pairs else (rows,)
    if not integers or step.dim() != 1 or len(step) not in lengths:
        what = type(step).__name__
        if isinstance(step, Tensor):
            what = f"a {step.dtype} tensor of shape {tuple(step.shape)}"
        needed = " or ".join(f"({n},)" for n in lengths)
        raise ValueError(f"step is {what}; expected integers of shape {needed}")
    if step.device != like.device:
        raise ValueError(f"step is on {step.device}; expected {like.device}, log_ratio's device")
    if readable(step) and (outside := [i for i in step.tolist() if not 0 <= i < n_steps]):
        raise ValueError(f"step contains {outside[0]}; expected 0 to {n_steps - 1}")
    return step.long() if len(step) == rows else step.long().repeat(2)


def _metrics(
    loss: Tensor,
    values: dict[str, Tensor | None],
    gather: bool,
    as_floats: bool,
    is_logit: bool = True,
) -> dict[str, Tensor] | dict[str, float]:
    """is_logit: whether margins are logits of a preference."""
    margin = values["margin"]
    assert margin is not None
    metrics = {"loss": loss.detach().mean()}
    for name, value in values.items():
        if value is not None:
            metrics[name] = value.mean()
        if name == "margin":
            metrics["accuracy"] = _accuracy(margin)
        if name == "margin" and is_logit:
            metrics["gradient_factor"] = torch.sigmoid(-margin).mean()
    return _averaged(metrics, margin.numel(), gather, as_floats)


def _accuracy(margin: Tensor) -> Tensor:
    """The share of margins above 0, ties counting half."""
    return ((margin > 0).float().mean() + (margin >= 0).float().mean()) / 2


def _averaged(
    metrics: dict[str, Tensor], n: int, gather: bool, as_floats: bool
) -> dict[str, Tensor] | dict[str, float]:
    """Over all processes, of which this one has n."""
    if gather and torch.distributed.is_available() and torch.distributed.is_initialized():
        values = torch.stack([*metrics.values()])
        sums = n * torch.cat([values, torch.ones_like(values[:1])])
        torch.distributed.all_reduce(sums)
        metrics = dict(zip(metrics, (sums[:-1] / sums[-1]).unbind(), strict=True))
    if as_floats:
        return dict(zip(metrics, torch.stack([*metrics.values()]).tolist(), strict=True))
    return metrics
