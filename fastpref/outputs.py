"""What the losses return."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor


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


def _metrics(
    loss: Tensor, values: dict[str, Tensor | None], gather: bool, as_floats: bool
) -> dict[str, Tensor] | dict[str, float]:
    margin = values["margin"]
    assert margin is not None
    won = (margin > 0).float().mean() + (margin >= 0).float().mean()
    metrics = {"loss": loss.detach().mean()}
    for name, value in values.items():
        if value is not None:
            metrics[name] = value.mean()
        if name == "margin":
            metrics["accuracy"] = won / 2
            metrics["gradient_factor"] = torch.sigmoid(-margin).mean()
    if gather and torch.distributed.is_available() and torch.distributed.is_initialized():
        sums = margin.numel() * torch.stack([*metrics.values(), torch.ones_like(won)])
        torch.distributed.all_reduce(sums)
        metrics = dict(zip(metrics, (sums[:-1] / sums[-1]).unbind(), strict=True))
    if as_floats:
        return dict(zip(metrics, torch.stack([*metrics.values()]).tolist(), strict=True))
    return metrics
