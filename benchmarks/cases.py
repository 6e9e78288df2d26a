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
import step_cases
from fastpref.dispatch import Impl
from fastpref_kernels import LINKS

TINY = "tiny"  # no model's: to see that everything runs
VIDEO = "wan240"
SHAPES = {
    TINY: (4, 8, 8),
    "sd15": (4, 64, 64),
    "sdxl": (4, 128, 128),
    "sd3": (16, 128, 128),
    VIDEO: (16, 5, 30, 52),  # Wan's, of 17 frames of 416 x 240: for a CPU
    "wan480": (16, 21, 60, 104),
    "hunyuan720": (16, 33, 90, 160),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
Loss = Callable[..., Tensor]


def each_error(pred: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(pred.float(), target.float(), reduction="none").flatten(1).mean(dim=1)


def whole(pred: Tensor, target: Tensor) -> Tensor:
    """A target that the pair shares is repeated, as trainers do."""
    return target if len(target) == len(pred) else torch.cat([target, target])


def errors(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """As trainers write it."""
    w, l = each_error(pred, whole(pred, target)).chunk(2)
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


# Beyond the links of pairs


def published_kto(pred: Tensor, target: Tensor, ref: Tensor, label: Tensor) -> Tensor:
    """jacklishufan/diffusion-kto train_kto_sd_v1.5.py, by one process."""
    with torch.no_grad():
        ref_errors = each_error(ref, target)
    reward = ref_errors - each_error(pred, target)
    sign = 2.0 * label - 1.0
    kl = reward.mean().detach().clamp(min=0)
    h = torch.sigmoid(sign * BETA * (reward - kl))
    return (torch.where(sign > 0, 1.0, UNDESIRABLE) * (1 - h)).mean()


def published_rankdpo(pred: Tensor, target: Tensor, ref: Tensor, score: Tensor) -> Tensor:
    """Algorithm 2 of arXiv:2410.18013, of which there is no code."""
    target = target.repeat_interleave(len(pred) // len(target), 0)
    with torch.no_grad():
        ref_errors = each_error(ref, target)
        rank = 1 + (score[:, None, :] > score[:, :, None]).sum(2)
        gain, discount = 2**score, 1 / torch.log(1 + rank)
        weight = (gain[:, :, None] - gain[:, None, :]).abs()
        weight *= (discount[:, :, None] - discount[:, None, :]).abs()
        weight *= score[:, :, None] > score[:, None, :]
    drop = (each_error(pred, target) - ref_errors).view(score.shape)
    lost = BETA * (drop[:, :, None] - drop[:, None, :])
    return (weight * F.softplus(lost)).sum((1, 2)).mean()


def published_dspo(pred: Tensor, target: Tensor, ref: Tensor) -> Tensor:
    """huaishengzhu/DSPO train.py, its SD1.5 form, for latents of any rank."""
    w, l = errors(pred, target)
    with torch.no_grad():
        ref_w, ref_l = errors(ref, target)
    share = 1 - torch.sigmoid(-0.5 * DSPO_BETA * ((w - l) - (ref_w - ref_l)))
    (pred_w, _), (ref_w, _) = pred.float().chunk(2), ref.float().chunk(2)
    target_w = target[: len(w)].float()
    share = share.view(-1, *[1] * (pred.dim() - 1))
    return ((pred_w - target_w) - DSPO_BETA * share * (pred_w - ref_w)).square().mean()


def published_safeguard(pred: Tensor, target: Tensor, ref: Tensor) -> Tensor:
    """Diffusion-SDPO's train.py, on Diffusion-DPO. The gradients for which it calls autograd are
    written out, for torch.compile, and 1e-9 is left out of the divisor, for next to that of a video
    it is not small."""
    w, l = errors(pred, target)
    with torch.no_grad():
        ref_w, ref_l = errors(ref, target)
        by_w, by_l = (2 / w.numel() * (pred.float() - whole(pred, target).float())).chunk(2)
        dot = (by_w * by_l).sum()
        scale = ((1 - SAFEGUARD) * by_w.square().sum() / dot).clamp(0, 1)
        scale = torch.where(dot > 0, scale, 1.0)
    l = l.detach() + scale * (l - l.detach())
    return -F.logsigmoid(-0.5 * BETA * ((w - l) - (ref_w - ref_l))).mean()


def published_dro(pred: Tensor, target: Tensor, ref: Tensor) -> Tensor:
    """Log-mean-exp over the batch as in DoRA's train_mistral_prompt.py, on Diffusion-DPO."""
    w, l = errors(pred, target)
    with torch.no_grad():
        ref_w, ref_l = errors(ref, target)
    losses = -F.logsigmoid(-0.5 * BETA * ((w - l) - (ref_w - ref_l)))
    return HEAT * torch.log(torch.exp(losses / HEAT).mean())


def dpo_on_errors(pred: Tensor, target: Tensor, ref: Tensor, *, impl: Impl = "auto") -> Tensor:
    """A loss of one's own around our errors."""
    gap_w, gap_l = fastpref.pair_errors(pred, target, ref, impl=impl)[2:]
    return -F.logsigmoid(-0.5 * BETA * (gap_w - gap_l)).mean()  # type: ignore[operator]


def called(function: Callable[..., Any], **numbers: Any) -> Loss:
    def loss(*tensors: Tensor, impl: Impl = "auto") -> Tensor:
        value: Tensor = function(*tensors, impl=impl, **numbers).loss
        return value

    return loss


UNDESIRABLE, DSPO_BETA, SAFEGUARD, HEAT = 1.5, 20.0, 0.9, 0.5


LATENTS = ("x", "old_pred", "ref_pred")  # operands that are as large as predictions


class Family(NamedTuple):
    """A loss that is not the link of a pair alone, all of which take the reference's predictions or
    an old policy's.

    kind: what is new to it. members: of a group. shared: whether they share the target. operands:
    what there is besides prediction and target, by the names of the loss. again: which of those
    backward has to read as well, for so many members (drifting).
    """

    kind: str
    published: Loss
    ours: Loss
    members: int = 2
    shared: bool = True
    operands: tuple[str, ...] = ("ref_pred",)
    again: tuple[str, ...] = ()
    drifting: int = 0

    @property
    def large(self) -> list[str]:
        return [name for name in self.operands if name in LATENTS]


def of_steps(
    published: Loss,
    function: Callable[..., Any],
    operands: tuple[str, ...],
    again: tuple[str, ...],
    members: int = 1,
    kind: str = "steps",
    **options: Any,
) -> Family:
    def ours(pred: Tensor, target: Tensor, *rest: Tensor, impl: Impl = "auto") -> Tensor:
        given: dict[str, Any] = dict(zip(operands, rest, strict=False))
        if kind == "steps":
            step = step_cases.transition(rest[len(operands) :])
            given |= {"x_next": target, "transition": step}
        else:
            given["target"] = target
        value: Tensor = function(pred, **given, **options, impl=impl).loss
        return value

    return Family(kind, published, ours, members, False, operands, again, drifting=members)


OF_STEPS = ("steps", "forward process")
CLIPPED, WITH_KL = {"clip_range": step_cases.CLIP}, {"kl_weight": step_cases.KL_WEIGHT}
DPO = fastpref.dpo_loss
RANKDPO = called(fastpref.rankdpo_loss, beta=BETA)
FAMILIES = {
    "kto": Family(
        "samples",
        published_kto,
        called(fastpref.kto_loss, beta=BETA, lambda_undesirable=UNDESIRABLE),
        members=1,
    ),
    "rankdpo_4": Family("lists", published_rankdpo, RANKDPO, members=4, shared=False),
    "rankdpo_8": Family("lists", published_rankdpo, RANKDPO, members=8),
    "dspo": Family(
        "sums", published_dspo, called(fastpref.dspo_loss, beta=DSPO_BETA),
        again=("ref_pred",), drifting=1,
    ),
    "dpo_safeguard": Family(
        "around", published_safeguard, called(DPO, beta=BETA, safeguard=SAFEGUARD)
    ),
    "dpo_dro": Family(
        "around", published_dro, called(DPO, beta=BETA, reduction="dro", dro_temperature=HEAT)
    ),
    "pair_errors": Family("errors", published_dpo, dpo_on_errors),
    "grpo": of_steps(
        step_cases.published_grpo, fastpref.grpo_loss, ("old_pred", "x", "ref_pred", "advantage"),
        ("x", "ref_pred"), **CLIPPED, **WITH_KL,
    ),
    "grpo_stored": of_steps(
        step_cases.published_stored, fastpref.grpo_loss, ("x", "old_log_prob", "advantage"), ("x",),
        old_pred=None, **CLIPPED,
    ),
    "grpo_guard": of_steps(
        step_cases.published_guard, fastpref.grpo_loss, ("old_pred", "x", "advantage"),
        ("old_pred", "x"), variant="guard", **CLIPPED,
    ),
    "step_dpo": of_steps(
        step_cases.published_step_dpo, fastpref.step_dpo_loss, ("ref_pred", "x"), ("x",), 2,
        beta=step_cases.STEP_BETA,
    ),
    "sdpo": of_steps(
        step_cases.published_sdpo, fastpref.sdpo_loss, ("old_pred", "x", "advantage"), ("x",), 2,
        **CLIPPED,
    ),
    "nft": of_steps(
        step_cases.published_nft, fastpref.nft_loss, ("old_pred", "ref_pred", "reward", "t"),
        ("old_pred", "ref_pred"), kind="forward process", beta=step_cases.NFT_BETA, **WITH_KL,
    ),
}  # fmt: skip


def fused(link: str, impl: Impl = "auto") -> Loss:
    if family := FAMILIES.get(link):
        return functools.partial(family.ours, impl=impl)
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
    family = FAMILIES.get(link)
    if published := family.published if family else PUBLISHED.get(link):
        found["eager"] = published
        if GPU or importlib.util.find_spec("triton"):
            found["compile"] = torch.compile(published, fullgraph=True)
        if GPU:
            mode = "reduce-overhead"
            found[mode] = torch.compile(published, mode=mode, fullgraph=True)
    found["fastpref"] = fused(link)
    return {name: loss for name, loss in found.items() if name in names}


class Case(NamedTuple):
    """What is measured: `shape` of a sample, pairs, dtypes, and whether pairs share the target.
    Instead of pairs, there may be as many lists, or twice as many single samples."""

    link: str
    shape: str
    pairs: int
    pred: str
    target: str
    shared: bool = True

    @property
    def family(self) -> Family | None:
        return FAMILIES.get(self.link)

    @property
    def members(self) -> int:
        return self.family.members if self.family else 2

    @property
    def samples(self) -> int:
        return max(self.members, 2) * self.pairs

    @property
    def targets(self) -> int:
        return self.samples // self.members if self.shared else self.samples

    @property
    def needs_ref(self) -> bool:
        return self.family is not None or LINKS[self.link].score.needs_ref

    def tensors(self) -> tuple[Tensor, ...]:
        """A prediction that wants a gradient, its target and, where they are needed, the
        reference's prediction, and labels or scores. Errors are 0.25: for much smaller ones MaPO's
        published formula is too far off to pass for right."""
        if self.family and self.family.kind in OF_STEPS:
            return self._of_steps(self.family)
        generator = torch.Generator(DEVICE).manual_seed(0)
        sample = SHAPES[self.shape]

        def randn(n: int) -> Tensor:
            return torch.randn(n, *sample, device=DEVICE, generator=generator)

        target = randn(self.targets)
        off = 0.5 * randn(self.samples)
        if self.family and self.members == 2:  # else the safeguard would have nothing to do
            off[self.pairs :] = 0.8 * off[: self.pairs] + 0.6 * off[self.pairs :]
        repeats = self.samples // self.targets
        of_each = target.repeat_interleave(repeats, 0) if self.members > 2 else (
            torch.cat([target] * repeats)
        )  # fmt: skip
        pred = (of_each + off).to(DTYPES[self.pred])
        tensors = (pred.clone().requires_grad_(), target.to(DTYPES[self.target]))
        if not self.needs_ref:
            return tensors
        moved = 0.05 * randn(self.samples)
        if self.family:  # by more from sample to sample, in which the losses are to differ
            steps = torch.linspace(1, 2, self.samples, device=DEVICE)
            moved *= steps.view(-1, *[1] * len(sample))
        return *tensors, (pred + moved).to(DTYPES[self.pred]), *self._numbers()

    def _of_steps(self, family: Family) -> tuple[Tensor, ...]:
        """A prediction, where the step of the old policy went, what the loss takes besides, and the
        step's numbers; of the forward process, a target, and no step."""
        generator = torch.Generator(DEVICE).manual_seed(0)
        sample = SHAPES[self.shape]

        def randn() -> Tensor:
            return torch.randn(self.samples, *sample, device=DEVICE, generator=generator)

        far = torch.linspace(0.05, 0.1, self.samples, device=DEVICE).view(-1, *[1] * len(sample))
        of_pred, of_target = DTYPES[self.pred], DTYPES[self.target]
        old, x = randn().to(of_pred), randn().to(of_target)
        pred = (old + far * randn()).to(of_pred)
        ref = (pred + far * randn()).to(of_pred)
        step = step_cases.step_numbers(self.samples, DEVICE)
        forward = family.kind == "forward process"
        target = (old + randn()).to(of_target) if forward else step.sample(x, old, generator)
        operands = {
            "x": x,
            "old_pred": old,
            "ref_pred": ref,
            "old_log_prob": step.log_prob(x, old, target),
            "advantage": step_cases.advantages(self.samples, DEVICE),
            "reward": step_cases.rewards(self.samples, DEVICE),
            "t": torch.linspace(0.2, 0.9, self.samples, device=DEVICE),
        }
        given = [operands[name] for name in family.operands]
        return pred.requires_grad_(), target, *given, *(() if forward else step[:5])

    def _numbers(self) -> tuple[Tensor, ...]:
        """Labels of samples, or scores of lists, no two of which are the same."""
        if self.members == 1:
            return (torch.arange(self.samples, device=DEVICE) % 3 > 0,)
        if self.members == 2:
            return ()
        order = 5 * torch.arange(self.samples, device=DEVICE).view(self.pairs, -1) % self.members
        return ((order + 1.0) / self.members,)

    def bytes_moved(self) -> tuple[int, int]:
        """The floor: forward reads every tensor; backward reads prediction and target, and what has
        a direction of its own in the gradient, and writes the gradient."""
        sample = torch.Size(SHAPES[self.shape]).numel()
        of_pred = self.samples * sample * DTYPES[self.pred].itemsize
        of_target = self.targets * sample * DTYPES[self.target].itemsize
        of_each = [of_target if name == "x" else of_pred for name in self.others]
        again = [of_each[i] * self.drifting // self.members for i in self.again]
        return of_pred + of_target + sum(of_each), 2 * of_pred + of_target + sum(again)

    @property
    def others(self) -> list[str]:
        """What is as large as latents besides prediction and target."""
        return self.family.large if self.family else ["ref_pred"] * self.needs_ref

    @property
    def drifting(self) -> int:
        return self.family.drifting if self.family else 0

    @property
    def again(self) -> list[int]:
        """Which of the others backward reads."""
        return [self.others.index(name) for name in (self.family.again if self.family else ())]

    @property
    def large(self) -> int:
        """How many of the tensors are as large as latents."""
        return 2 + len(self.others)


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
