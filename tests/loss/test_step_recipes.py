"""docs/steps.md: each snippet, run in fp64 on small tensors, against what the trainer computes."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastpref

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "steps.md").read_text()
(
    SAMPLING, ADVANTAGE, FLOW_GRPO, STORED, CPS, DANCE, FLOW_FACTORY, FF_GUARD, VERL_OMNI, NFT,
    SDPO, D3PO, SPO, PSO,
) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)  # fmt: skip
B, SHAPE, STEP = 4, (2, 4, 5), 3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def mean(value: Tensor) -> Tensor:
    """Over a sample's elements."""
    return value.flatten(1).mean(1)


# The steps, as published --------------------------------------------------------------------------


class Step(NamedTuple):
    """mu(x, pred), the standard deviation, and the trainers' std_dev_t and dt (below 0)."""

    mu: Callable[[Tensor, Tensor], Tensor]
    std: float
    std_dev_t: float = 1.0
    dt: float = -1.0

    def log_prob(self, x: Tensor, pred: Tensor, x_next: Tensor) -> Tensor:
        square = (x_next - self.mu(x, pred)) ** 2
        return mean(-square / (2 * self.std**2)) - math.log(self.std * math.sqrt(2 * math.pi))


def flow_schedule(n: int = 10) -> Any:
    even = torch.linspace(1, 0, n + 1, dtype=torch.float64)
    sigmas = 3 * even / (1 + 2 * even)
    return SimpleNamespace(sigmas=sigmas, timesteps=1000 * sigmas[:-1])


FLOW = flow_schedule()


def sde(g: float, step: int = STEP) -> Step:
    sigma, dt = float(FLOW.sigmas[step]), float(FLOW.sigmas[step + 1] - FLOW.sigmas[step])
    half = g**2 / (2 * sigma)
    return Step(
        lambda x, v: x * (1 + half * dt) + v * (1 + half * (1 - sigma)) * dt,
        g * math.sqrt(-dt), g, dt,
    )  # fmt: skip


def flow_sde(step: int = STEP) -> Step:
    sigma = float(FLOW.sigmas[step])
    return sde(0.7 * math.sqrt(sigma / (1 - sigma)), step)


def ddim_schedule() -> Any:
    """Stable Diffusion's, of 20 steps."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    config = SimpleNamespace(num_train_timesteps=1000, prediction_type="epsilon")
    return SimpleNamespace(
        alphas_cumprod=(1 - betas).cumprod(0), timesteps=torch.arange(951, 0, -50),
        num_inference_steps=20, config=config,
    )  # fmt: skip


DDIM = ddim_schedule()


def ddim(step: int = STEP) -> Step:
    """sdpo's ddim_step_with_logprob, eta 1."""
    t = int(DDIM.timesteps[step])
    at, ap = (float(DDIM.alphas_cumprod[i]) for i in (t, max(t - 50, 0)))
    std = math.sqrt((1 - ap) / (1 - at) * (1 - at / ap))

    def mu(x: Tensor, eps: Tensor) -> Tensor:
        x0 = (x - math.sqrt(1 - at) * eps) / math.sqrt(at)
        return math.sqrt(ap) * x0 + math.sqrt(1 - ap - std**2) * eps

    return Step(mu, std)


# Comparing ----------------------------------------------------------------------------------------


def a_step(step: Step, n: int = B, scale: Sequence[float] = (1e-4, 1e-3, 3e-2, 1e-1)) -> Any:
    """Names that snippets take for given. The policy is farther from the old one in each sample;
    the third goes farther still, and the fourth goes back, with an advantage above the clip."""
    x, old_pred = randn(n, *SHAPE), randn(n, *SHAPE)
    x_next = step.mu(x, old_pred) + step.std * randn(n, *SHAPE)
    far = torch.tensor(scale, dtype=torch.float64).repeat(n // len(scale)).view(-1, 1, 1, 1)
    model_pred = old_pred + far * randn(n, *SHAPE)
    log_ratio = step.log_prob(x, model_pred, x_next) - step.log_prob(x, old_pred, x_next)
    advantage = torch.tensor([1.5, -0.7, 2.0, -7.0]).double().repeat(n // 4)
    advantage[2:] *= log_ratio[2:].sign()
    return {
        "torch": torch, "fastpref": fastpref, "scheduler": FLOW, "step": STEP, "x": x,
        "x_next": x_next, "old_pred": old_pred, "model_pred": model_pred,
        "ref_pred": old_pred + 0.05 * randn(n, *SHAPE), "advantage": advantage,
        "old_log_prob": step.log_prob(x, old_pred, x_next),
    }  # fmt: skip


def run(code: str, names: Any, leaf: str | None = "model_pred", get: str = "out.loss") -> Any:
    """(value, gradients) of a snippet; leaf: which names have one, with spaces between."""
    names = dict(names)
    leaves = {name: names[name].clone().requires_grad_() for name in (leaf or "").split()}
    names |= leaves
    exec(code, names)
    value = eval(get, names)
    return value, torch.autograd.grad(value, [*leaves.values()]), names


def check(
    code: str,
    names: Any,
    theirs: Callable[..., Tensor],
    leaf: str = "model_pred",
    get: str = "out.loss",
    rtol: float = 1e-6,
) -> Any:
    """Transitions have fp32 coefficients, which is what the tolerances are for."""
    value, grads, after = run(code, names, leaf, get)
    leaves = [names[name].clone().requires_grad_() for name in leaf.split()]
    wanted = theirs(*leaves)
    torch.testing.assert_close(value, wanted, rtol=rtol, atol=0.0)
    for grad, exact in zip(grads, torch.autograd.grad(wanted, leaves), strict=True):
        assert exact.abs().max() > 0
        torch.testing.assert_close(grad, exact, rtol=1e-5, atol=float(2e-6 * exact.abs().max()))
    return after


def some(clipped: Tensor) -> bool:
    return 0 < clipped.sum().item() < clipped.numel()


def ppo(log_ratio: Tensor, advantage: Tensor, below: float, above: float | None = None) -> Tensor:
    """Per sample."""
    a, ratio = advantage.clamp(-5, 5), log_ratio.exp()
    high = 1 + (below if above is None else above)
    return torch.maximum(-a * ratio, -a * ratio.clamp(1 - below, high))


# What all need ------------------------------------------------------------------------------------


def test_sampling() -> None:
    """In bf16: ratios are 1, and the gradient is that of the noise that was drawn, as rounded."""
    weight = torch.full(SHAPE, 0.3, requires_grad=True)
    advantage = torch.tensor([1.0, -2.0, 0.5, 3.0])
    names = {
        "torch": torch, "fastpref": fastpref, "scheduler": FLOW, "n_steps": 4,
        "noise": torch.randn(B, *SHAPE), "model": lambda x, t: weight * x.float(),
        "advantage": advantage,
    }  # fmt: skip
    exec(SAMPLING, names)
    out: Any = names["out"]
    assert torch.equal(out.log_ratio, torch.zeros(B))
    assert out.metrics()["ratio_off"] == 0.0
    trajectory: Any = names["trajectory"]
    assert len(trajectory) == 5
    assert all(latents.dtype == torch.bfloat16 for latents in trajectory)
    exact = weight.detach().double().requires_grad_()
    x, x_next = (latents.double() for latents in trajectory[1:3])
    loss = -(advantage * flow_sde(1).log_prob(x, exact * x, x_next)).mean()
    (grad,) = torch.autograd.grad(loss, exact)
    torch.testing.assert_close(weight.grad, grad.float(), rtol=1e-4, atol=1e-6)


def test_advantages() -> None:
    names: Any = {"fastpref": fastpref, "rewards": randn(12), "k": 3}
    exec(ADVANTAGE, names)
    groups = names["rewards"].view(4, 3)
    off = groups - groups.mean(1, keepdim=True)
    wanted = off / (groups.std(1, correction=0, keepdim=True) + 1e-4)
    torch.testing.assert_close(names["advantage"], wanted.flatten())
    exec(ADVANTAGE.replace("(rewards, k)", '(rewards, k, std="batch")'), names)
    wanted = off / (groups.std(correction=0) + 1e-4)
    torch.testing.assert_close(names["advantage"], wanted.flatten())
    exec(ADVANTAGE.replace("(rewards, k)", "(rewards, k, eps=0.0)"), names)  # Flow-Factory
    wanted = off / groups.std(1, correction=0, keepdim=True).clamp(min=1e-6)
    torch.testing.assert_close(names["advantage"], wanted.flatten())


# GRPO ---------------------------------------------------------------------------------------------


def test_flow_grpo() -> None:
    """train_sd3.py, lines 880 to 905, whose std_dev_t is g."""
    step = flow_sde()
    names = a_step(step)
    x, ref_mean = names["x"], step.mu(names["x"], names["ref_pred"])

    def policy(pred: Tensor) -> Tensor:
        log_ratio = step.log_prob(x, pred, names["x_next"]) - names["old_log_prob"]
        return ppo(log_ratio, names["advantage"], 1e-4).mean()

    def theirs(pred: Tensor) -> Tensor:
        kl = mean((step.mu(x, pred) - ref_mean) ** 2) / (2 * step.std_dev_t**2)
        return policy(pred) + 0.04 * kl.mean()

    after = check(FLOW_GRPO, names, theirs)
    assert some(after["out"].clipped)
    stored = check(STORED, {**names, "transition": after["transition"]}, policy)
    assert torch.equal(stored["out"].clipped, after["out"].clipped)


def test_flow_grpo_with_cps() -> None:
    sigma, after = (float(FLOW.sigmas[STEP + i]) for i in (0, 1))
    std = after * math.sin(0.7 * math.pi / 2)

    def mu(x: Tensor, v: Tensor) -> Tensor:
        x0, noise = x - sigma * v, x + v * (1 - sigma)
        return x0 * (1 - after) + noise * math.sqrt(after**2 - std**2)

    names = a_step(Step(mu, std))

    def log_prob(pred: Tensor) -> Tensor:
        return -mean((names["x_next"] - mu(names["x"], pred)) ** 2)

    def theirs(pred: Tensor) -> Tensor:
        return ppo(log_prob(pred) - log_prob(names["old_pred"]), names["advantage"], 1e-5).mean()

    assert some(check(CPS, names, theirs)["out"].clipped)

    def with_kl(pred: Tensor) -> Tensor:
        """std_dev_t is the standard deviation there."""
        apart = mu(names["x"], pred) - mu(names["x"], names["ref_pred"])
        return theirs(pred) + 0.04 * (mean(apart**2) / (2 * std**2)).mean()

    options = 'clip_range=1e-5, ref_pred=ref_pred, kl_weight=0.04, kl="gaussian"'
    check(CPS.replace("clip_range=1e-5", options), names, with_kl)


def test_dance_grpo() -> None:
    """Of two rewards, each with its coefficient; MixGRPO's step is this or Flow-GRPO's."""
    step = sde(0.25)
    names = a_step(step)
    names |= {"sigmas": FLOW.sigmas, "vq_coef": 1.0, "mq_coef": 0.5}
    names |= {"vq_advantage": names["advantage"], "mq_advantage": 0.3 - names["advantage"]}

    def theirs(pred: Tensor) -> Tensor:
        log_ratio = step.log_prob(names["x"], pred, names["x_next"]) - names["old_log_prob"]
        vq, mq = (ppo(log_ratio, names[f"{kind}_advantage"], 1e-4).mean() for kind in ("vq", "mq"))
        return vq + 0.5 * mq

    check(DANCE, names, theirs, get="loss")


@pytest.mark.parametrize("kl_type", ["v-based", "x-based"])
def test_flow_factory_grpo(kl_type: str) -> None:
    """trainers/grpo.py, with other bounds above and below."""
    step = flow_sde()
    names = a_step(step)
    names["transition"] = fastpref.transitions.flow_sde(FLOW, STEP)
    names["args"] = SimpleNamespace(
        clip_range=(-1e-4, 2e-3), adv_clip_range=(-5.0, 5.0), kl_beta=0.2, kl_type=kl_type
    )

    def theirs(pred: Tensor) -> Tensor:
        log_ratio = step.log_prob(names["x"], pred, names["x_next"]) - names["old_log_prob"]
        one, two = pred, names["ref_pred"]
        if kl_type == "x-based":
            one, two = step.mu(names["x"], one), step.mu(names["x"], two)
        return (
            ppo(log_ratio, names["advantage"], 1e-4, 2e-3).mean() + 0.2 * ((one - two) ** 2).mean()
        )

    check(FLOW_FACTORY, names, theirs)


def guarded(step: Step, names: Any, pred: Tensor, clip: float) -> Tensor:
    """Per sample, without the division by dt."""
    scale = math.sqrt(-step.dt) * step.std_dev_t
    bias = mean((step.mu(names["x"], pred) - step.mu(names["x"], names["old_pred"])) ** 2)
    log_ratio = step.log_prob(names["x"], pred, names["x_next"]) - names["old_log_prob"]
    return ppo((log_ratio + bias / (2 * scale**2)) * scale, names["advantage"], clip)


def test_flow_factory_guard() -> None:
    """Its ratio as it is for a batch of one, which is where its broadcast is right."""
    step = flow_sde()
    names = a_step(step)
    names["transition"] = fastpref.transitions.flow_sde(FLOW, STEP)
    after = check(FF_GUARD, names, lambda pred: guarded(step, names, pred, 2e-6).mean(), rtol=1e-9)
    assert some(after["out"].clipped)


# verl-omni ----------------------------------------------------------------------------------------


@pytest.fixture
def algos(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the snippet imports of verl-omni, and then the snippet."""
    module: Any = ModuleType("verl_omni.trainer.diffusion.diffusion_algos")
    module.registry = {}

    def register(name: str) -> Any:
        def decorator(cls: type) -> type:
            module.registry[name] = cls()
            return cls

        return decorator

    module.register_diffusion_loss = register
    module.DiffusionLossResult = SimpleNamespace
    for name in ("FlowGRPOLoss", "GRPOGuardLoss", "FlowDPPOLoss", "DiffusionNFTLoss"):
        setattr(module, name, type(name, (), {}))
    parents: Any = [ModuleType("verl_omni"), ModuleType("verl_omni.trainer")]
    parents.append(ModuleType("verl_omni.trainer.diffusion"))
    parents[-1].diffusion_algos = module
    for made in (*parents, module):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    exec(VERL_OMNI, {"torch": torch, "fastpref": fastpref})
    return module


def test_verl_omni_with_cps() -> None:
    """std_dev_t is the standard deviation there, and the log-probability has no denominator."""
    step = Step(lambda x, mu: mu, 0.3, 0.3)
    names = a_step(step)
    body = VERL_OMNI[VERL_OMNI.index("def on_means") : VERL_OMNI.index("@algos")]
    for old, new in ((".flatten() * sqrt_dt", ".flatten()"), ("0.5 / std**2", "one")):
        assert old in body
        body = body.replace(old, new)

    def theirs(mu: Tensor) -> Tensor:
        off, old_off = (mean((names["x_next"] - m) ** 2) for m in (mu, names["old_pred"]))
        return ppo(old_off - off, names["advantage"], 1e-4).mean()

    names["algos"] = SimpleNamespace(DiffusionLossResult=SimpleNamespace)
    names["data"] = {
        "advantages": names["advantage"], "next_latents": names["x_next"],
        "old_prev_sample_mean": names["old_pred"],
    }  # fmt: skip
    names["output"] = {
        "std_dev_t": torch.full((B, 1, 1, 1), 0.3), "sqrt_dt": torch.full((B,), 0.2)
    }  # fmt: skip
    body += "result = on_means({**output, 'prev_sample_mean': model_pred}, data, clip_range=1e-4)"
    check(body, names, theirs, get="result.loss")


@pytest.mark.parametrize("weights", [None, (1.0, 0.5, 0.0, 2.0)])
@pytest.mark.parametrize("loss", ["flow_grpo", "grpo_guard", "flow_dppo"])
def test_verl_omni(algos: Any, loss: str, weights: tuple[float, ...] | None) -> None:
    """diffusion_algos.py; the gradient is that by the mean of the step."""
    step = flow_sde()
    names = a_step(step)
    x, x_next, advantage = (names[name] for name in ("x", "x_next", "advantage"))
    identity = step._replace(mu=lambda x, mu: mu)
    of_means = {**names, "old_pred": step.mu(x, names["old_pred"])}
    cfg = SimpleNamespace(clip_ratio=1e-4, adv_clip_max=5.0, kl_mask_threshold=1e-5)
    if loss == "grpo_guard":
        cfg.clip_ratio = 2e-6
    weight = torch.ones(B) if weights is None else torch.tensor(weights)
    data = {"advantages": advantage, "next_latents": x_next}
    data["old_prev_sample_mean"] = of_means["old_pred"]
    if weights is not None:
        data["rollout_is_weights"] = weight

    def ours(mu: Tensor) -> Any:
        output = {
            "prev_sample_mean": mu,
            "std_dev_t": torch.full((B, 1, 1, 1), step.std_dev_t),
            "sqrt_dt": torch.full((B,), math.sqrt(-step.dt)),
        }
        config = SimpleNamespace(diffusion_loss=cfg)
        return algos.registry[loss](config=config, model_output=output, data=data)

    def theirs(mu: Tensor) -> Tensor:
        log_ratio = identity.log_prob(x, mu, x_next) - names["old_log_prob"]
        if loss == "flow_grpo":
            return (ppo(log_ratio, advantage, 1e-4) * weight).mean()
        if loss == "grpo_guard":
            return (guarded(identity, of_means, mu, 2e-6) * weight).mean() / -step.dt
        far = mean((mu - of_means["old_pred"]) ** 2) / (2 * step.std**2) >= 1e-5
        away = log_ratio.sign() == advantage.sign()
        assert some(far & away)
        return (torch.where(far & away, 0.0, -advantage * log_ratio.exp()) * weight).mean()

    names["mu"] = step.mu(x, names["model_pred"])
    after = check("result = ours(mu)", names | {"ours": ours}, theirs, "mu", "result.loss")
    metrics = after["result"].metrics
    assert all(name.startswith("actor/") for name in metrics)
    assert 0 < metrics["actor/clip_fraction"] < 1


def test_the_limit_of_dppo_without_coefficient() -> None:
    """add_kl_coefficient=False, as the page has it."""
    step = flow_sde()
    names = a_step(step)
    names["transition"] = fastpref.transitions.flow_sde(FLOW, STEP)
    difference = step.mu(names["x"], names["model_pred"]) - step.mu(names["x"], names["old_pred"])
    divergence = mean(difference**2) / 2
    limit = float(divergence[2:].mean())
    out = fastpref.grpo_loss(
        names["model_pred"], names["old_pred"], names["x"], names["x_next"], names["transition"],
        names["advantage"].abs(), variant="dppo", divergence_limit=limit / step.std**2,
    )  # fmt: skip
    up = step.log_prob(names["x"], names["model_pred"], names["x_next"]) > names["old_log_prob"]
    assert torch.equal(out.clipped.bool(), up & (divergence >= limit))


# DiffusionNFT -------------------------------------------------------------------------------------


def nft_names() -> Any:
    t = torch.tensor([0.9, 0.4, 0.15, 1.0]).double()
    x0, noise, old_pred = randn(3, B, *SHAPE)
    at = t.view(-1, 1, 1, 1)
    return {
        "fastpref": fastpref, "torch": torch, "x0": x0, "noise": noise, "t": t,
        "xt": (1 - at) * x0 + at * noise, "old_pred": old_pred,
        "model_pred": old_pred + 0.2 * randn(B, *SHAPE),
        "ref_pred": old_pred + 0.1 * randn(B, *SHAPE),
        "advantage": torch.tensor([1.0, -0.3, -8.0, 0.0]).double(),
    }  # fmt: skip


def nft(names: Any, pred: Tensor, beta: float, kl_weight: float, limit: float = 5.0) -> Tensor:
    """train_nft_sd3.py, lines 895 to 985."""
    x0, xt, old, t = names["x0"], names["xt"], names["old_pred"], names["t"].view(-1, 1, 1, 1)
    reward = (names["advantage"].clamp(-limit, limit) / limit / 2 + 0.5).clamp(0, 1)

    def of(velocity: Tensor) -> Tensor:
        error = xt - t * velocity - x0
        return mean(error**2) / mean(error.detach().abs()).clip(min=1e-5)

    positive = of(beta * pred + (1 - beta) * old)
    negative = of((1 + beta) * old - beta * pred)
    policy = (reward * positive + (1 - reward) * negative) / beta * limit
    return policy.mean() + kl_weight * ((pred - names["ref_pred"]) ** 2).mean()


def test_diffusion_nft() -> None:
    names = nft_names()
    check(NFT, names, lambda pred: nft(names, pred, 1.0, 1e-4))
    small = NFT.replace("beta=1.0", "beta=0.1")
    check(small, names, lambda pred: nft(names, pred, 0.1, 1e-4))


@pytest.mark.parametrize("limit", [5.0, 2.0])
def test_nft_in_verl_omni(algos: Any, limit: float) -> None:
    names = nft_names()
    cfg = SimpleNamespace(adv_clip_max=limit, mix_beta=0.5, ref_kl_coef=0.01)
    advantage = names["advantage"].clamp(-limit, limit)
    data = {"reward_prob": (advantage / limit / 2 + 0.5).clamp(0, 1)}

    def ours(pred: Tensor) -> Any:
        output = {
            "forward_prediction": pred, "old_prediction": names["old_pred"], "x0": names["x0"],
            "xt": names["xt"], "t_expanded": names["t"].view(-1, 1, 1, 1),
            "ref_forward_prediction": names["ref_pred"],
        }  # fmt: skip
        config = SimpleNamespace(diffusion_loss=cfg)
        return algos.registry["diffusion_nft"](config=config, model_output=output, data=data)

    check(
        "result = ours(model_pred)", names | {"ours": ours},
        lambda pred: nft(names, pred, 0.5, 0.01, limit), get="result.loss",
    )  # fmt: skip


# SDPO ---------------------------------------------------------------------------------------------


def sdpo_advantages(latents: Tensor, decoded: Tensor) -> Tensor:
    """Of one prompt; train_sdpo.py, lines 554 to 572 and 631 to 644."""
    n, steps = latents.shape[:2]
    flat = latents.flatten(2)
    like = torch.nn.functional.cosine_similarity(flat[:, :, None], flat[:, None], dim=-1)
    anchor = (like[:, :, 0] + like[:, :, -1]).argmin(1)
    dense = torch.empty(n, steps).double()
    for i in range(n):
        at = [0, int(anchor[i]), steps - 1]
        similar = like[i][:, at]
        dense[i] = (similar * decoded[i]).sum(1) / similar.sum(1)
        for k in (0, 2, 1):
            dense[i, at[k]] = decoded[i, k]
    discount = 0.99 ** (torch.arange(steps) - torch.arange(steps)[:, None]).double()
    returns = dense @ discount.triu().T
    return (returns - returns.mean(0)) / (returns.std(0, correction=0) + 1e-6)


def test_sdpo() -> None:
    """train_sdpo.py, lines 771 to 808. A prompt's statistics need 16 rewards."""
    n, j = 16, STEP
    step = ddim()
    names = a_step(step, 2 * n, (1e-4, 1e-3, 1e-2, 1e-1))
    latents = randn(2 * n, 6, *SHAPE) + 2 * randn(2 * n, 1, *SHAPE)  # all similar, so sums are > 0
    names |= {"scheduler": DDIM, "j": j, "prompts": ["a prompt"] * (2 * n)}
    names |= {"clean_latents": latents, "decoded_rewards": randn(2 * n, 3)}
    advantage = sdpo_advantages(latents, names["decoded_rewards"])[:, j].clamp(-5, 5)

    def theirs(pred: Tensor) -> Tensor:
        log_ratio = step.log_prob(names["x"], pred, names["x_next"]) - names["old_log_prob"]
        apart = advantage[:n] - advantage[n:]
        squares = []
        for lr in (log_ratio, log_ratio.clamp(-1e-4, 1e-4)):
            squares.append((0.99**j * (lr[:n] - lr[n:]) - apart) ** 2)
        return torch.maximum(*squares).mean()

    after = check(SDPO, names, theirs)
    torch.testing.assert_close(after["advantages"][:, j].clamp(-5, 5), advantage)
    assert some(after["out"].clipped)


# Step DPO -----------------------------------------------------------------------------------------


def step_dpo(log_ratio_w: Tensor, log_ratio_l: Tensor, beta: float) -> Tensor:
    """Per pair."""
    w, l = (log_ratio.exp().clamp(0.9, 1.1).log() for log_ratio in (log_ratio_w, log_ratio_l))
    return -torch.log(torch.sigmoid(beta * (w - l)))


def pairs(step: Step, schedule: Any, suffixes: str) -> Any:
    """Two trajectories' steps; the first pair's first ratio is beyond the clamp."""
    names: Any = {"torch": torch, "fastpref": fastpref, "scheduler": schedule, "step": STEP}
    for suffix in suffixes:
        of_half = a_step(step, scale=(2.0 if suffix == suffixes[0] else 1e-3, 1e-3, 1e-2, 0.1))
        for ours, name in (
            ("x", "x"),
            ("x_next", "x_next"),
            ("ref", "old_pred"),
            ("pred", "model_pred"),
        ):
            names[f"{ours}_{suffix}"] = of_half[name]
    return names


def log_ratio(step: Step, names: Any, suffix: str, pred: Tensor) -> Tensor:
    x, ref, x_next = (names[f"{name}_{suffix}"] for name in ("x", "ref", "x_next"))
    return step.log_prob(x, pred, x_next) - step.log_prob(x, ref, x_next)


def test_d3po() -> None:
    """scripts/train.py, lines 411 to 413."""
    step = ddim()
    names = pairs(step, DDIM, "wl")

    def theirs(pred_w: Tensor, pred_l: Tensor) -> Tensor:
        w, l = log_ratio(step, names, "w", pred_w), log_ratio(step, names, "l", pred_l)
        return step_dpo(w, l, 0.1).mean()

    after = check(D3PO, names, theirs, "pred_w pred_l")
    assert some(after["out"].clipped)


@pytest.mark.parametrize(("beta", "clip"), [("10.0", "0.1"), ("500.0", "0.1"), ("10.0", "None")])
def test_spo(beta: str, clip: str) -> None:
    """train_spo_sdxl.py, lines 669 to 671, and compare_funcs.py; LPO's beta; and without clamp, as
    TailorPO's is believed to be."""
    step = ddim()
    n = 2 * B
    x, ref_pred = randn(2, n, *SHAPE)
    far = torch.tensor([1e-3, 1e-2, 0.1, 2.0]).double().repeat(2).view(-1, 1, 1, 1)
    names = {
        "torch": torch, "fastpref": fastpref, "scheduler": DDIM, "step": STEP, "x": x,
        "pred": ref_pred, "ref_pred": ref_pred, "model_pred": ref_pred + far * randn(n, *SHAPE),
        "step_reward": lambda candidates: 3 * candidates.flatten(2).mean(2),
    }  # fmt: skip
    code = SPO.replace("beta=10.0", f"beta={beta}, clip={clip}")
    _, _, after = run(code, names, "model_pred", "loss")
    w, l, scores = after["x_next_w"], after["x_next_l"], after["scores"]
    for i in range(n):
        ranked = scores[:, i].sort().indices
        assert torch.equal(w[i], after["candidates"][ranked[-1], i])
        assert torch.equal(l[i], after["candidates"][ranked[0], i])
    likely = torch.stack([after["best"], after["worst"]]).softmax(0)
    keep = likely[0] - likely[1] > 0.3
    assert some(keep)
    assert torch.equal(after["keep"], keep.float())

    def theirs(pred: Tensor) -> Tensor:
        up, down = (step.log_prob(x, pred, y) - step.log_prob(x, ref_pred, y) for y in (w, l))
        if clip == "None":
            return torch.nn.functional.softplus(-10 * (up - down))[keep].mean()
        return step_dpo(up, down, float(beta))[keep].mean()

    update = code[code.index("# In the update") :]
    after = check(update, {**names, **{k: after[k] for k in ("x_next_w", "x_next_l", "keep")},
                           "transition": after["transition"]}, theirs, get="loss")  # fmt: skip
    assert some(after["out"].clipped) == (clip == "0.1")


@pytest.mark.parametrize("sampler", ["euler_ancestral", "lcm"])
@pytest.mark.parametrize("mixed", [False, True])
def test_pso_online(mixed: bool, sampler: str) -> None:
    """train_online_pso_sdxl_turbo.py, lines 844 to 850, with the steps of
    turbo_inference_with_logprob.py and distilled_inference_with_logprob.py."""
    levels = torch.tensor([14.6, 4.1, 1.6, 0.7, 0.0]).double()
    if sampler == "lcm":
        levels = 1 / (1 + levels**2)

    def step(i: int) -> Step:
        if sampler == "lcm":
            at, ap = float(levels[i]), float(levels[i + 1])
            scale = math.sqrt(ap / at)
            return Step(lambda x, eps: scale * (x - math.sqrt(1 - at) * eps), math.sqrt(1 - ap))
        sigma, after = float(levels[i]), float(levels[i + 1])
        std = math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2)
        down = math.sqrt(after**2 - std**2)
        return Step(lambda x, eps: x + (down - sigma) * eps, std)

    at = [1, 1, 1, 1] if not mixed else [0, 2, 1, 2]
    names: Any = {}
    for i in (0, 1, 2):  # each pair's rows come from its own step
        of_step = pairs(step(i), levels, "12")
        for name, value in of_step.items():
            if isinstance(value, Tensor) and value.dim() > 1:
                rows = names.setdefault(name, value.clone())
                mine = torch.tensor(at) == i
                rows[mine] = value[mine]
    names |= {"torch": torch, "fastpref": fastpref, "scheduler": levels}
    names["step"] = torch.tensor(at) if mixed else 1
    names["rewards_1"] = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 2.0], [3.0, 1.0]])
    names["rewards_2"] = torch.tensor([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0], [2.0, 0.0]])

    def theirs(pred_1: Tensor, pred_2: Tensor) -> Tensor:
        of_reward = seen["of_reward"]
        labels = torch.where(
            names["rewards_1"][:, of_reward] <= names["rewards_2"][:, of_reward], -1.0, 1.0
        ).double()
        losses = []
        for i, which in enumerate(at):
            row = {
                k: v[i : i + 1] for k, v in names.items() if isinstance(v, Tensor) and v.dim() > 2
            }
            one = log_ratio(step(which), row, "1", pred_1[i : i + 1])
            two = log_ratio(step(which), row, "2", pred_2[i : i + 1])
            one, two = (r.exp().clamp(0.9, 1.1).log() for r in (one, two))
            inside = 50.0 * one * labels[i] - 50.0 * two * labels[i]
            losses.append(-torch.log(torch.sigmoid(inside)))
        return torch.cat(losses).mean()

    code = PSO.replace("euler_ancestral", sampler)
    torch.manual_seed(0)
    _, _, seen = run(code, names, "pred_1 pred_2")
    torch.manual_seed(0)
    check(code, names, theirs, "pred_1 pred_2")
    assert sorted(set(seen["first"].tolist())) == [False, True]
