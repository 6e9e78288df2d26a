"""What is compared with what: the losses as trainers write them, compiled, and fused, and on which
inputs."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastpref
from fastpref_kernels import LINKS

TINY = "tiny"  # no model's: to see that everything runs
SHAPES = {
    TINY: (4, 8, 8),
    "sd15": (4, 64, 64),
    "sdxl": (4, 128, 128),
    "sd3": (16, 128, 128),
    "wan480": (16, 21, 60, 104),
    "hunyuan720": (16, 33, 90, 160),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
Loss = Callable[..., Tensor]


def errors(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """As trainers write it; a target that the pair shares is repeated, as they do."""
    target = target if len(target) == len(pred) else torch.cat([target, target])
    squares = F.mse_loss(pred.float(), target.float(), reduction="none")
    w, l = squares.flatten(1).mean(dim=1).chunk(2)
    return w, l


def published_mapo(pred: Tensor, target: Tensor) -> Tensor:
    """mapo-t2i/mapo utils.py."""
    w, l = errors(pred, target)
    log_odds = 0.5 * w / (torch.exp(0.5 * w) - 1) - 0.5 * l / (torch.exp(0.5 * l) - 1)
    return w.mean() - (0.1 * F.logsigmoid(1000 * log_odds)).mean()


def published_dpo(pred: Tensor, target: Tensor, ref: Tensor) -> Tensor:
    """SalesforceAIResearch/DiffusionDPO train.py, which its offspring share."""
    w, l = errors(pred, target)
    with torch.no_grad():
        ref_w, ref_l = errors(ref, target)
    return -F.logsigmoid(-0.5 * BETA * ((w - l) - (ref_w - ref_l))).mean()


BETA = 100.0  # errors here are 0.25, so that the margin stays where everything counts
PUBLISHED: dict[str, Loss] = {"mapo": published_mapo, "dpo_sigmoid": published_dpo}


def fused(link: str, impl: fastpref.dispatch.Impl = "auto") -> Loss:
    hyper: dict[str, Any] = {
        name: 0.3 for name, h in LINKS[link].hyper.items() if h.default is None
    }
    hyper |= {"beta": BETA} if LINKS[link].score.needs_ref else {}

    def loss(*tensors: Tensor) -> Tensor:
        return fastpref.pair_loss(*tensors, link=link, impl=impl, **hyper).loss

    return loss


FLOOR = "floor"  # as good as a provider: launches that do nothing but read and write
PROVIDERS = ("eager", "compile", "reduce-overhead", "fastpref", FLOOR)


def providers(link: str, names: Collection[str] = PROVIDERS) -> dict[str, Loss]:
    """By name; the published formula where a trainer has one."""
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # backward alone is timed with retain_graph
    found: dict[str, Loss] = {}
    if published := PUBLISHED.get(link):
        found["eager"] = published
        if GPU or importlib.util.find_spec("triton"):
            found["compile"] = torch.compile(published, fullgraph=True)
        if GPU:
            mode = "reduce-overhead"
            found[mode] = torch.compile(published, mode=mode, fullgraph=True)
    found["fastpref"] = fused(link)
    return {name: loss for name, loss in found.items() if name in names}


class Case(NamedTuple):
    """What is measured: `shape` of a sample, pairs, dtypes, and whether pairs share the target."""

    link: str
    shape: str
    pairs: int
    pred: str
    target: str
    shared: bool = True

    def tensors(self) -> tuple[Tensor, ...]:
        """A prediction that wants a gradient, its target and, where it is needed, the reference's
        prediction, with errors of 0.25: for much smaller ones MaPO's published formula is too far
        off to pass for right."""
        generator = torch.Generator(DEVICE).manual_seed(0)
        sample = SHAPES[self.shape]

        def randn(n: int) -> Tensor:
            return torch.randn(n, *sample, device=DEVICE, generator=generator)

        target = randn(self.pairs if self.shared else 2 * self.pairs)
        whole = torch.cat([target, target]) if self.shared else target
        pred = (whole + 0.5 * randn(2 * self.pairs)).to(DTYPES[self.pred])
        tensors = (pred.clone().requires_grad_(), target.to(DTYPES[self.target]))
        if not LINKS[self.link].score.needs_ref:
            return tensors
        return *tensors, (pred + 0.05 * randn(2 * self.pairs)).to(DTYPES[self.pred])

    def bytes_moved(self) -> tuple[int, int]:
        """The floor: forward reads every tensor; backward reads prediction and target and writes
        the gradient."""
        shape = SHAPES[self.shape]
        sample = torch.Size(shape).numel()
        of_pred = 2 * self.pairs * sample * DTYPES[self.pred].itemsize
        n_targets = self.pairs if self.shared else 2 * self.pairs
        of_target = n_targets * sample * DTYPES[self.target].itemsize
        of_ref = of_pred if LINKS[self.link].score.needs_ref else 0
        return of_pred + of_target + of_ref, 2 * of_pred + of_target


@functools.cache
def one(dtype: torch.dtype) -> Tensor:
    """A loss's own gradient: autograd would launch a kernel to make it."""
    return torch.ones((), dtype=dtype, device=DEVICE)


def step(loss: Loss, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    if GPU:
        torch.compiler.cudagraph_mark_step_begin()
    value = loss(*tensors)
    return value, torch.autograd.grad(value, tensors[0], one(value.dtype))[0]


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def is_right(loss: Loss, case: Case) -> bool:
    """Whether loss and gradient agree with the reference in fp64."""
    tensors = case.tensors()
    exact = tuple(t.detach().double() for t in tensors)
    exact[0].requires_grad_()
    wanted, wanted_grad = step(fused(case.link, "torch"), exact)
    value, grad = step(loss, tensors)
    off = (grad.double() - wanted_grad).abs().max() / wanted_grad.abs().max()
    tolerance = 2e-2 if case.pred != "fp32" else 5e-3  # exp(x) - 1 costs the published formula 2e-3
    return bool((value - wanted).abs() < 5e-3 * wanted.abs() and off < tolerance)
