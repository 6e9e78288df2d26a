"""The README's code does what it says."""

from __future__ import annotations

import copy
import csv
import importlib.util
import inspect
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

import derived
import fastpref
import fastpref_kernels
from toy.tiny import TIME_WIDTH, tiny_sdxl

README_PATH = Path(__file__).resolve().parents[2] / "README.md"
README = README_PATH.read_text()
USE, DPO, BEFORE, AFTER, OWN, REWARDS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def rows(header: str) -> list[list[str]]:
    """The cells of the table under a header line."""
    lines = README[README.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


MSE, REF_MSE = torch.tensor([0.31, 0.35]).double(), torch.tensor([0.3102, 0.3497]).double()
NAMES: dict[str, Any] = {
    "mse_w": MSE[0],
    "mse_l": MSE[1],
    "drop_w": MSE[0] - REF_MSE[0],
    "drop_l": MSE[1] - REF_MSE[1],
    "softplus": F.softplus,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "log": torch.log,
    "phi": lambda x: x / torch.expm1(x),
}


def evaluated(text: str, **names: Any) -> float:
    return float(eval(text, {**NAMES, **names}))


def call(function: Any, needs_ref: bool, **options: Any) -> fastpref.LossOutput:
    """On samples of one element, whose errors are those of NAMES."""
    root, ref = MSE.sqrt()[:, None], REF_MSE.sqrt()[:, None]
    given = {"ref_pred": ref} if needs_ref else {}
    return function(root, torch.zeros_like(root), **given, **options)  # type: ignore[no-any-return]


def test_the_table_of_losses_is_what_they_compute() -> None:
    """Every public loss is there; formulas, evaluated, give its loss and margin at its defaults."""
    table = rows("| function | loss | margin | needs | beta |")
    assert [row[0] for row in table] == derived.PAIRS
    for name, loss, margin, needs, beta in table:
        if name == "dspo_loss":  # of elements, not of errors: see test_beyond_pairs.py
            continue
        function = getattr(fastpref, name)
        defaults: dict[str, Any] = {
            key: value.default
            for key, value in inspect.signature(function).parameters.items()
            if isinstance(value.default, (int, float))
        }
        if name == "pso_loss":  # which has a beta for each loss_type
            defaults["beta"] = fastpref_kernels.LINKS["pso_hinge"].hyper["beta"].default
        assert float(beta or "nan") == pytest.approx(defaults.get("beta", math.nan), nan_ok=True)
        required = [need for need in needs.split(", ") if need not in ("", "ref")]
        defaults |= dict.fromkeys(required, 0.7)
        options: dict[str, Any] = dict.fromkeys(required, 0.7)
        for missing in required:
            with pytest.raises(TypeError, match=f"{missing} is missing"):
                call(function, "ref" in needs, **{k: v for k, v in options.items() if k != missing})
        if "ref" in needs:
            with pytest.raises(ValueError, match="ref_pred or ref_mse is missing"):
                call(function, False, **options)
        if name == "self_npo_loss":
            options["huber_c"] = None
        if "paired" in inspect.signature(function).parameters:
            options["paired"] = True
        out = call(function, "ref" in needs, **options)
        names: dict[str, Any] = {**defaults, "T": defaults.get("num_train_timesteps")}
        wanted = evaluated(margin, **names)
        assert out.margin.item() == pytest.approx(wanted, rel=1e-9), name
        names |= {"margin": torch.tensor(wanted), "p": torch.sigmoid(torch.tensor(wanted).double())}
        text = loss.split("`")[0]
        assert out.loss.item() == pytest.approx(evaluated(text, **names), rel=1e-6), name


def test_the_table_of_dpo_loss_types_is_what_they_compute() -> None:
    cells = rows("| loss_type | loss | | loss_type | loss |")
    table = [pair for row in cells for pair in (row[:2], row[3:]) if pair[0]]
    assert sorted(name for name, _ in table) == sorted(fastpref.conventions.DPO_LOSS_TYPES)
    for name, loss in table:
        options: dict[str, Any] = {"loss_type": name, "beta": 60.0}
        names: dict[str, Any] = {"beta": 60.0, "e": 0.1, "alpha": 0.6}
        options |= {"label_smoothing": 0.1} if name in ("robust", "exo_pair") else {}
        options |= {"alpha": 0.6} if name == "alpha" else {}
        scale = 1.0 if name in ("ipo", "sppo_hard") else 30.0
        w, l = -scale * NAMES["drop_w"], -scale * NAMES["drop_l"]
        names |= {"w": w, "l": l, "margin": w - l, "p": torch.sigmoid(w - l)}
        out = call(fastpref.dpo_loss, True, **options)
        assert out.loss.item() == pytest.approx(evaluated(loss, **names), rel=1e-9), name


def test_the_table_of_conventions_is_the_one_in_code() -> None:
    table = rows("| convention | factor | elements | T |")
    listed = {
        name.strip("` "): (eval(factor), elements == "sum", timesteps == "yes")
        for names, factor, elements, timesteps in table
        for name in names.split(",")
    }
    assert listed == {name: tuple(c[:3]) for name, c in fastpref.CONVENTIONS.items()}
    lines = (fastpref.convert_beta.__doc__ or "").splitlines()
    for name, (factor, sums, timesteps) in listed.items():
        row = next(line.split() for line in lines if line.split()[:1] == [name])
        assert (eval(row[1]), row[2] == "sum", row[3] == "yes") == (factor, sums, timesteps)


def test_the_table_of_methods_names_what_exists() -> None:
    table = README[README.index("| method | arXiv |") :].split("\n\n")[0]
    assert len(table.splitlines()) == 2 + 18
    for function in re.findall(r"`(\w+_loss)", table):
        assert hasattr(fastpref, function), function
    for module, name in re.findall(r"`(\w+)\.(\w+)", table):
        if importlib.util.find_spec(f"fastpref.{module}"):  # guidance may not be there yet
            assert hasattr(importlib.import_module(f"fastpref.{module}"), name), name


@pytest.fixture(scope="module")
def trainer() -> dict[str, Any]:
    """What the README takes for given: a small SDXL, and three pairs of latents and prompts."""
    pipeline = tiny_sdxl(sample_size=8)
    n_pairs, unet = 3, pipeline.unet
    width = unet.config.cross_attention_dim
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * TIME_WIDTH
    return {
        "B": n_pairs,
        "latents": torch.randn(2 * n_pairs, 4, 8, 8),
        "scheduler": pipeline.scheduler,
        "unet": unet,
        "reference_unet": copy.deepcopy(unet),
        "prompt_embeds": torch.randn(2 * n_pairs, 7, width),
        "pooled_prompt_embeds": torch.randn(2 * n_pairs, pooled),
        "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]]).repeat(2 * n_pairs, 1),
    }


def test_use(trainer: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """MaPO and then Diffusion-DPO, as written, on a UNet with SDXL's conditions."""
    names = dict(trainer)
    exec(USE, names)
    printed = eval(capsys.readouterr().out)
    assert list(printed) == ["loss", "mse_w", "mse_l", "margin", "accuracy", "gradient_factor"]
    for name in printed:
        assert name in USE
    assert all(p.grad is not None for p in trainer["unet"].parameters())
    exec(DPO, names)
    out = names["out"]
    wanted = math.log(2.0) + 0.1 * out.mse_w.mean().item()  # the policy is still the reference
    assert out.loss.item() == pytest.approx(wanted, rel=1e-5)
    assert out.loss.requires_grad


def test_own_terms_carry_a_gradient() -> None:
    target = torch.randn(6, 4, 8, 8)
    pred = (target + 0.5 * torch.randn_like(target)).requires_grad_()
    names: dict[str, Any] = {"fastpref": fastpref, "F": F, "model_pred": pred, "target": target}
    exec(OWN, names)
    (grad,) = torch.autograd.grad(names["loss"], pred)
    (without,) = torch.autograd.grad(fastpref.mapo_loss(pred, target).loss, pred)
    own = 0.1 * 2 * (pred - target) / target[0].numel() / 3
    torch.testing.assert_close(grad[:3] - without[:3], own[:3], rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(grad[3:], without[3:])


def test_from_rewards() -> None:
    """Of three prompts, the second has images of equal rewards, and so no pair."""
    rewards = torch.tensor([[[0.0, 1], [2, 3]], [[1, 1], [1, 1]], [[4, 0], [0, -1]]])
    preds = torch.randn(3, 3, 2, 4, 8, 8).unbind()
    names: dict[str, Any] = {"fastpref": fastpref, "rewards": rewards}
    names |= dict(zip(("model_pred", "target", "ref_pred"), preds, strict=True))
    exec(REWARDS, names)
    w, l = ([x[0, i].double() for x in preds] for i in (1, 0))
    drop_w, drop_l = ((p - t).square().mean() - (r - t).square().mean() for p, t, r in (w, l))
    rates = 2 * torch.sigmoid(torch.tensor([[2.0, 2.0], [4.0, 1.0]])) - 1
    torch.testing.assert_close(names["pairs"].delta, rates.mean(1))
    assert names["pairs"].prompt.tolist() == [0, 2]
    # fp32 knows each drop to a few of its last bits; their difference may be much smaller.
    off = 2500 * 4 * torch.finfo(torch.float32).eps * (drop_w.abs() + drop_l.abs()).item()
    wanted = -2500.0 * (drop_w - drop_l)
    torch.testing.assert_close(names["out"].margin[0].double(), wanted, rtol=0, atol=off)


def test_figures_of_log_ratios_are_those_of_the_rows() -> None:
    results = README_PATH.parent / "benchmarks" / "results"
    with (results / "precision-steps.csv").open() as file:
        found = [row for row in csv.DictReader(file) if row["quantity"] == "log-ratio"]

    def span(column: str, provider: str) -> str:
        values = [float(row[column]) for row in found if row["provider"].startswith(provider)]
        return f"{min(values):.0e} to {max(values):.0e}".replace("e-0", "e-")

    largest = [float(row["largest"]) for row in found]
    text = README[README.index("The log-ratio of a sampler's step") :].split("\n\n")[0]
    text = text.replace("\n", " ")
    assert f"{min(largest):.0e} to {max(largest):.1e}".replace("e-0", "e-") in text
    assert span("worst_error", "published") in text
    ours = [row for row in found if row["provider"] in ("fastpref, torch", "fastpref, kernel")]
    errors = [float(row["worst_error"]) for row in ours]
    assert f"{min(errors):.0e} to {max(errors):.0e}" in text


def test_figures_of_precision_are_those_of_the_rows() -> None:
    """The README's table against what `benchmarks/precision.py` wrote."""
    results = Path(__file__).resolve().parents[2] / "benchmarks" / "results"

    def read(name: str, **wanted: str) -> list[dict[str, str]]:
        with (results / name).open() as file:
            rows = [row for row in csv.DictReader(file)
                    if all(row[key] == value for key, value in wanted.items())]  # fmt: skip
        return sorted(rows, key=lambda row: row["provider"], reverse=True)  # published code first

    mapo = [row for row in read("precision.csv", decade="-2") if row["provider"][-5:] != "torch"]
    half = "precision-half.csv"
    first = [read(half, dtype="bfloat16", stage="first step", mse=mse) for mse in ("0.1", "1.2")]
    later = [read(half, dtype=dtype, stage="later", mse="0.1") for dtype in ("bfloat16", "float16")]
    wanted = [
        [float(f"{float(row['loss_rel_error']):.0e}") for row in mapo],
        *[[float(row["loss"]) for row in each] for each in first],
        *[[float(f"{float(row['loss_rel_error']):.0e}") for row in each] for each in later],
    ]
    shown = [[float(cell) for cell in row[1:]] for row in rows("| | published code | fastpref |")]
    for got, exact in zip(shown, wanted, strict=True):
        assert got == pytest.approx(exact, abs=5e-4, rel=1e-6)


def test_before_and_after_give_the_same_numbers() -> None:
    target = torch.randn(6, 4, 8, 8)
    names: dict[str, Any] = {
        "torch": torch,
        "F": F,
        "fastpref": fastpref,
        "model_pred": target + 0.5 * torch.randn(6, 4, 8, 8),
        "target": target,
        "beta": 0.1,
        "snr": 0.5,
        "scheduler": DDPMScheduler(),
    }
    before, after = dict(names), dict(names)
    exec(BEFORE, before)
    exec(AFTER, after)
    assert after["loss"].item() == pytest.approx(before["loss"].item(), rel=1e-3)
    torch.testing.assert_close(after["out"].mse_w, before["w"])
    torch.testing.assert_close(after["out"].mse_l, before["l"])
