"""The README's code does what it says."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

import fastpref

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
USE, BEFORE, AFTER = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_eight_lines_of_use() -> None:
    logged: dict[str, Any] = {}
    weight = torch.ones((), requires_grad=True)
    names: dict[str, Any] = {
        "torch": torch,
        "B": 3,
        "latents": torch.randn(6, 4, 8, 8),
        "timesteps": torch.tensor([10, 500, 900]),
        "scheduler": DDPMScheduler(),
        "prompt_embeds": torch.randn(3, 7, 16),
        "unet": lambda noisy, t, prompts: SimpleNamespace(sample=noisy * weight),
        "accelerator": SimpleNamespace(log=logged.update),
    }
    exec(USE, names)
    assert list(logged) == ["loss", "mse_w", "mse_l", "margin", "accuracy", "gradient_factor"]
    for name in logged:
        assert name in USE
    assert weight.grad is not None
    assert len(USE.strip().splitlines()) == 8


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
    torch.testing.assert_close(after["w"], before["w"])
    torch.testing.assert_close(after["l"], before["l"])
