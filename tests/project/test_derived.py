"""What is derived from the functions in losses.py: exports, modules, and the README's table."""

from __future__ import annotations

import importlib.util
import inspect
import pickle
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import derived
import fastpref
from fastpref import modules
from fastpref_kernels import LINKS

PUBLIC: list[str] = vars(fastpref)["__all__"]  # which type checkers do not see
MODULES = {name: getattr(fastpref, derived.class_name(name)) for name in derived.LOSSES}


def test_the_written_files_are_up_to_date() -> None:
    """If not, run `python tests/helpers/derived.py`."""
    assert derived.MODULES.read_text() == derived.modules()
    assert derived.README.read_text() == derived.readme()


def test_everything_public_is_exported() -> None:
    for name in PUBLIC:
        assert hasattr(fastpref, name)
    assert set(PUBLIC) >= {
        *derived.LOSSES,
        *modules.__all__,
        "pair_loss",
        "register_link",
    }
    assert len(modules.__all__) == len(derived.LOSSES)
    changelog = (derived.ROOT / "CHANGELOG.md").read_text()
    assert [name for name in derived.LOSSES if name not in changelog] == []


def test_a_checker_sees_what_is_exported(tmp_path: Path) -> None:
    """`__all__` is worked out at run time; mypy must see the same names, and their types."""
    api = pytest.importorskip("mypy.api")
    names = [name for name in PUBLIC if name != "inversion"]
    script = tmp_path / "user.py"
    script.write_text(
        f"import torch\nfrom fastpref import {', '.join(names)}\n"
        "x = torch.zeros(2, 3)\n"
        "out: LossOutput = SmPOLoss(beta=3.0)(x, x, x, prob=0.3)\n"
        "DPOLoss(beta='strong')\nDPOLoss(snr=0.5)\nSePPOLoss(loser_weight=0.5)\n"
        "SFTLoss(model_pred=3)\ndpo_loss(x, x, loss_type='sigmoi')\n"
        "import fastpref\nfastpref.Knobs\n"
    )
    root = derived.ROOT
    text, _, _ = api.run(
        [
            *("--strict", "--follow-imports=silent", "--config-file=", "--no-error-summary"),
            *(f"--cache-dir={root / '.mypy_cache' / 'user'}", str(script)),
        ]
    )
    found = [line.partition("error: ")[2] for line in text.splitlines() if "error: " in line]
    wanted = (
        'Argument "beta" to "DPOLoss"', 'Unexpected keyword argument "snr" for "DPOLoss"',
        'Unexpected keyword argument "loser_weight" for "SePPOLoss"',
        'Unexpected keyword argument "model_pred" for "SFTLoss"',
        'Argument "loss_type" to "dpo_loss"', 'Module has no attribute "Knobs"',
    )  # fmt: skip
    assert len(found) == len(wanted), text
    for line, start in zip(found, wanted, strict=True):
        assert line.startswith(start), text


def batch(name: str) -> dict[str, Any]:
    """The tensors of a step, in the order in which the function takes them, and needed numbers."""
    generator = torch.Generator().manual_seed(0)
    step = modules.zeros_of(derived.LOSSES[name], 3)
    for key, value in step.items():
        if isinstance(value, torch.Tensor):
            step[key] = torch.rand(value.shape, generator=generator)
    if name not in derived.STEPS and "ref" in derived.needs(name):
        ref = torch.rand(step["model_pred"].shape, generator=generator)
        pred, target = step.pop("model_pred"), step.pop("target")
        step = {"model_pred": pred, "target": target, "ref_pred": ref, **step}
    for key in {"label", "real"} & step.keys():
        step[key] = torch.tensor([True, False, True])
    return {key: 0.7 if isinstance(value, float) else value for key, value in step.items()}


def own_of(name: str) -> dict[str, Any]:
    """Options without which a loss does not do here."""
    paired = name in ("sft_loss", "self_npo_loss")
    return {"paired": True} if paired else {"beta": 0.7} if name == "step_dpo_loss" else {}


@pytest.mark.parametrize("name", derived.LOSSES)
def test_a_module_has_its_functions_signature(name: str) -> None:
    function, module = derived.LOSSES[name], MODULES[name]
    of_function, of_module = (inspect.signature(f).parameters for f in (function, module))
    options = {key: p for key, p in of_function.items() if key not in modules.STEP}
    assert [*of_module] == [*options]
    for key, parameter in options.items():
        assert of_module[key].default == parameter.default
        assert of_module[key].annotation == parameter.annotation
    assert module.__name__.lower() == name.replace("_", "")


@pytest.mark.parametrize("name", derived.LOSSES)
def test_a_module_is_its_function(name: str) -> None:
    """With options given at construction, and again in the call."""
    function, kind = derived.LOSSES[name], MODULES[name]
    own = own_of(name)
    step = batch(name)
    numbers = {key: step.pop(key) for key in modules.needed_of(function)}
    known = kind.knobs.__annotations__
    weight = next(k for k in ("weight", "pair_weight", "sample_weight") if k in known)
    wanted = function(**step, **numbers, **own, **{weight: 0.3})
    made = kind(**own, **{weight: 0.3})
    for module in (made, pickle.loads(pickle.dumps(made))):
        torch.testing.assert_close(module(**step, **numbers), wanted)
        torch.testing.assert_close(module(*step.values(), *numbers.values()), wanted)
    weighed = kind(**{weight: 0.1}, **own, **dict.fromkeys(numbers, 0.2))
    again = weighed(*step.values(), *numbers.values(), **{weight: 0.3})
    torch.testing.assert_close(again, wanted)
    assert f"{weight}=0.3" in repr(made)
    assert made.options == {weight: 0.3, **own}
    torch._dynamo.reset()
    compiled = torch.compile(made, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**step, **numbers).loss, wanted.loss)


def test_tensors_at_construction() -> None:
    """Of one value, of one a pair, and of one a sample: sizes must agree with one another."""
    pred, target, ref = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"beta": torch.tensor([1.0, 2.0, 3.0]), "mask": torch.ones(3, 5)}
    options |= {"sample_weight": torch.rand(6), "sft_weight": torch.tensor(0.2)}
    out = fastpref.PSOLoss(loss_type="sigmoid", **options)(pred, target, ref)
    wanted = fastpref.pso_loss(pred, target, ref, loss_type="sigmoid", **options)
    torch.testing.assert_close(out, wanted)
    unpaired = fastpref.SFTLoss(paired=False, pair_weight=torch.rand(6))
    assert unpaired(pred, target).mse_w.shape == (6,)
    assert fastpref.DPOLoss(sample_weight=(torch.ones(3), 2.0))(pred, target, ref).loss.isfinite()
    assert fastpref.DPOLoss(mask=(torch.ones(3, 5), torch.ones(3, 5))).options


def test_the_guide_to_a_loss_outside_is_code_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """As a file, because Triton reads the source of what it compiles."""
    guide = (derived.ROOT / "CONTRIBUTING.md").read_text()
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "import" in c)
    path = tmp_path / "from_the_guide.py"
    path.write_text(code)
    monkeypatch.setitem(LINKS, "exponential", LINKS["mapo"])  # which undoes what follows
    generator = torch.Generator().manual_seed(0)
    pred, target, ref = (0.1 * torch.randn(3, 6, 5, generator=generator)).to(device)
    mse, ref_mse = ((x - target).square().mean(1) for x in (pred, ref))
    spec = importlib.util.spec_from_file_location("from_the_guide", path)
    assert spec
    assert spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    vars(module).update(model_pred=pred, target=target, ref_pred=ref, mse=mse, ref_mse=ref_mse)
    spec.loader.exec_module(module)
    margin = -100.0 * (mse - ref_mse)[:3] + 100.0 * (mse - ref_mse)[3:]
    torch.testing.assert_close(module.out.loss, torch.exp(-margin).mean(), rtol=1e-4, atol=0)
    assert module.out.loss.isfinite()
    for impl in ("triton", "torch"):
        out = fastpref.pair_loss(
            pred, target, ref, link="exponential", rate=0.02, beta=20.0, impl=impl
        )
        wanted = torch.exp(-0.002 * margin).mean()
        torch.testing.assert_close(out.loss, wanted, rtol=1e-4, atol=0)


X = torch.zeros(6, 5)
REFUSED: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("dpo_loss", ValueError, {"impl": "tritn"}),
    ("dpo_loss", ValueError, {"loss_type": "sigmoi"}),
    ("dpo_loss", ValueError, {"loss_type": "exo_pair"}),
    ("dpo_loss", ValueError, {"loss_type": "alpha", "alpha": -1}),
    ("dpo_loss", ValueError, {"alpha": 0.5}),
    ("dpo_loss", ValueError, {"beta": -1}),
    ("dpo_loss", ValueError, {"reduction": "avg"}),
    ("dpo_loss", ValueError, {"error_reduction": "avg"}),
    ("dpo_loss", ValueError, {"beta": torch.tensor([1.0, -1.0, 1.0])}),
    ("dpo_loss", ValueError, {"beta": torch.ones(3, 2)}),
    ("dpo_loss", ValueError, {"beta": torch.ones(3, requires_grad=True)}),
    ("dpo_loss", ValueError, {"huber_c": -0.1}),
    ("dpo_loss", TypeError, {"mask": 3}),
    ("dpo_loss", TypeError, {"swap": "no"}),
    ("dpo_loss", TypeError, {"sample_weight": (1.0, 2.0, 3.0)}),
    ("mapo_loss", TypeError, {"beta": True}),
    ("mapo_loss", TypeError, {"beta": "strong"}),
    ("smpo_loss", ValueError, {"prob": 1.5}),
    ("pso_loss", ValueError, {"loss_type": "ipo"}),
    ("pso_loss", ValueError, {"prior_weight": -0.1}),
    ("seppo_loss", TypeError, {"sign": "minus"}),
    ("npo_loss", ValueError, {"loss_type": "robust"}),
    ("sft_loss", TypeError, {"paired": 1}),
    ("sft_loss", TypeError, {"paired": False, "swap": True}),
]


@pytest.mark.parametrize(("name", "error", "options"), REFUSED)
def test_construction_refuses_what_the_call_refuses(
    name: str, error: type[Exception], options: dict[str, Any]
) -> None:
    given = (X,) if "ref" in derived.needs(name) else ()
    needed = dict.fromkeys(modules.needed_of(derived.LOSSES[name]), 0.5)
    with pytest.raises(error) as of_call:
        derived.LOSSES[name](X, X if "paired" in options else X[:3], *given, **needed | options)
    with pytest.raises(error) as at_construction:
        MODULES[name](**options)
    assert str(at_construction.value) == str(of_call.value)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (
            "sft_loss",
            {"model_pred": 3},
            "SFTLoss got unexpected argument model_pred; it accepts pa",
        ),
        ("dpo_loss", {"ref_mse": X[:, 0]}, "DPOLoss got unexpected argument ref_mse; it accepts"),
        ("dpo_loss", {"snr": 0.5, "x": 1}, "DPOLoss got unexpected arguments snr, x; it accepts"),
        ("dpo_loss", {"link": "mapo"}, "DPOLoss got unexpected argument link"),
        ("seppo_loss", {"loser_weight": 0.5}, "SePPOLoss got unexpected argument loser_weight"),
        ("npo_loss", {"swap": True}, "NPOLoss got unexpected argument swap"),
    ],
)
def test_construction_refuses_unknown_names(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=words) as error:
        MODULES[name](**options)
    accepted = str(error.value).partition("it accepts ")[2].split(", ")
    assert not {*accepted} & {*options, "knobs"}
    for other in accepted:
        texts = (fastpref.pair_loss.__doc__, derived.LOSSES[name].__doc__)
        assert any(other in (text or "") for text in texts)


def test_a_module_may_be_made_where_its_kernels_cannot_run() -> None:
    assert fastpref.DPOLoss(impl="triton").options == {"impl": "triton"}


@pytest.mark.parametrize("name", derived.LOSSES)
def test_every_knob_that_a_module_takes_is_one_that_its_function_takes(name: str) -> None:
    """The TypedDict of its **knobs neither lacks one nor has one too many."""
    function = derived.LOSSES[name]
    own = own_of(name) | batch(name)
    values: dict[str, Any] = dict.fromkeys(
        ("sample_weight", "pair_weight", "logit_scale", "sft_weight", "loser_weight", "weight",
         "prior_weight", "label_smoothing", "huber_c", "loser_gradient_scale", "safeguard",
         "anchor_weight"), 0.3)  # fmt: skip
    values |= {"mask": torch.ones(3, 1), "swap": False, "error_reduction": "sum"}
    values |= {"reduction": "sum", "impl": "torch", "safeguard_over": "pair"}
    values |= {"dro_temperature": 1.0}
    known = {*MODULES[name].knobs.__annotations__}
    assert known <= {*values}
    declared = {*inspect.signature(function).parameters}
    for knob, value in values.items():
        if knob in known:
            assert knob not in declared
            refused = knob == "anchor_weight" and "ref" not in derived.needs(name)
            refused |= knob == "safeguard" and name == "self_npo_loss"  # errors are no squares
            with pytest.raises(ValueError, match=knob) if refused else nullcontext():
                function(**own | {knob: value})
        elif knob not in declared:
            with pytest.raises(TypeError, match=r"multiple values|unexpected"):
                function(**own | {knob: value})
