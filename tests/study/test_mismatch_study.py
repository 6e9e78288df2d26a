"""The study of reference mismatch: its parts against known answers, and all of it in small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref.guidance import AnnealedGuidance
from study import guidance as guidance_study
from study import mismatch as mismatch_study
from study.checks import check, report
from study.digits import ALPHAS, STYLES, Digits, UNet, add_noise, load_splits, paint, restyle
from study.judge import frechet, spread
from study.methods import MAIN, METHODS, TRIALS, Rewards, choose, describe, read_trials
from study.runs import Run, World, align, draw, execute, load_world, make_base, make_judge
from trainer.files import write_whole

SMALL: dict[str, Any] = {"steps": 30, "samples": 60, "base_steps": 80, "judge_steps": 60}
MAPO = {"lr": 2e-3, "num_train_timesteps": 100.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study")
    make_base(path, SMALL["base_steps"], "cpu", paint_steps=3)
    make_judge(path, SMALL["judge_steps"], "cpu")
    return path


@pytest.fixture(scope="module")
def world(folder: Path) -> World:
    return load_world(folder, SMALL["base_steps"], SMALL["judge_steps"], "cpu")


def mean(history: list[dict[str, float]], name: str, rows: slice) -> float:
    values = [row[name] for row in history[rows]]
    return sum(values) / len(values)


def test_the_study_in_small(folder: Path, world: World) -> None:
    """MaPO learns the other style, and a run that is there already is not done again."""
    run = Run("invert", "MaPO", MAPO, seed=1, **SMALL)
    record = execute(folder, run, "cpu")
    history, result = record["history"], record["result"]
    assert [row["step"] for row in history] == list(range(1, 31))
    assert mean(history, "mse_w", slice(-6, None)) < 0.9 * mean(history, "mse_w", slice(6))
    assert mean(history, "accuracy", slice(-6, None)) > mean(history, "accuracy", slice(6)) + 0.2
    assert result["mse_w"] < 0.9 * result["ref_mse_w"]
    assert result["accuracy_ref"] > 0.9
    assert 0 < result["floor"] < result["frechet"]
    assert len(record["pictures"]) == 10

    path = folder / "runs" / f"{run.name}.json"
    path.write_text(path.read_text().replace('"joint": ', '"joint": 7', 1))
    assert execute(folder, run, "cpu")["result"]["joint"] >= 7  # taken from the file
    path.write_text(path.read_text().replace(world.fingerprint, "another world"))
    again = execute(folder, run, "cpu")["result"]
    assert again == pytest.approx(result | {"seconds": again["seconds"]})


# One of pairs and one of samples; each loss's kernels have tests of their own.
@pytest.mark.parametrize(
    "method",
    ["MaPO", "KTO", *(pytest.param(each, marks=pytest.mark.slow)
                      for each in ("DPO+winner", "RankDPO", "DSPO"))],
)  # fmt: skip
def test_fused_and_plain_losses_give_the_same_curves(
    folder: Path, device: torch.device, method: str
) -> None:
    world = load_world(folder, SMALL["base_steps"], SMALL["judge_steps"], str(device))
    setting = {**METHODS[method].settings[-1], "lr": 4e-4}
    curves = [
        align(world, Run("thick", method, setting, 1, **{**SMALL, "steps": 4}, impl=impl))[1]
        for impl in ("triton", "torch")
    ]
    for fused, plain in zip(*curves, strict=True):
        assert fused == pytest.approx(plain, rel=2e-3, abs=1e-5)
    assert curves[0][0]["mse_w"] != curves[0][-1]["mse_w"]


def test_methods_of_a_seed_see_the_same(world: World) -> None:
    """The first step comes before any difference; another seed draws other pairs."""
    short = {**SMALL, "steps": 1}
    first = {
        method: align(world, Run("thick", method, METHODS[method].settings[0], 3, **short))[1][0]
        for method in MAIN
    }
    assert len({row["mse_w"] for row in first.values()}) == 1
    other = align(world, Run("thick", "SFT", {"lr": 1e-4}, 4, **short))[1][0]
    assert other["mse_w"] != first["SFT"]["mse_w"]
    assert first["DPO"]["ref_mse_w"] == pytest.approx(first["DPO"]["mse_w"])


def test_unpaired_images_and_lists_are_drawn_from_the_pairs() -> None:
    labels = load_splits().train.labels

    def drawn(group: int) -> tuple[torch.Tensor, ...]:
        return draw(labels, group, *(torch.Generator().manual_seed(seed) for seed in (3, 1003)))

    chosen, timesteps, noise = drawn(2)
    assert torch.equal(timesteps[:32], timesteps[32:])
    assert torch.equal(noise[:32], noise[32:])

    same, own, noises = drawn(1)
    assert torch.equal(same, chosen)
    assert torch.equal(own[:32], timesteps[:32])
    assert torch.equal(noises[:32], noise[:32])
    assert (own[32:] != own[:32]).sum() > 24
    assert len(noises.flatten(1).unique(dim=0)) == 64

    lists, shared, noises = drawn(4)
    first, second = lists.view(2, 16)
    assert torch.equal(first, chosen[:16])
    assert torch.equal(labels[second], labels[first])
    assert not (first == second).any()
    assert torch.equal(shared.view(4, 16), timesteps[:16].expand(4, 16))
    assert len(noises.flatten(1).unique(dim=0)) == 64


def test_a_list_is_two_winners_and_their_losers() -> None:
    """RankDPO gets rows list by list, and the judge's scores in the same order."""
    seen: dict[str, list[float]] = {}

    def loss(*tensors: torch.Tensor, **knobs: Any) -> Any:
        seen.update(rows=tensors[0].tolist(), score=knobs["score"].flatten().tolist())

    method = METHODS["RankDPO"]._replace(loss=loss)
    rewards = Rewards(torch.arange(4.0), torch.arange(4.0, 8.0))
    method.call(rewards, torch.cat(rewards))
    assert seen["rows"] == seen["score"] == [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_prefers_the_winner(name: str) -> None:
    """A small step down each loss's gradient raises the loser's error against the winner's."""
    method = METHODS[name]
    assert len(method.settings) == TRIALS
    assert len({describe(setting) for setting in method.settings}) == TRIALS
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 1, 16, 16, generator=generator)
    target = noise.repeat(2, 1, 1, 1)
    pred = target + 0.2 * torch.randn(8, 1, 16, 16, generator=generator)
    for setting in method.settings:
        pred = pred.detach().requires_grad_(True)
        knobs = {k: v for k, v in setting.items() if k != "lr"}
        rewards = Rewards(torch.full((4,), 0.9), torch.full((4,), 0.1))
        refs = [pred.detach()] if method.needs_ref else []
        out = method.call(rewards, pred, target, *refs, impl="torch", **knobs)
        out.loss.backward()
        assert pred.grad is not None
        moved = pred.detach() - 1e-3 / pred.grad.abs().max() * pred.grad
        w, l = (pred.detach() - target).square().flatten(1).mean(1).chunk(2)
        new_w, new_l = (moved - target).square().flatten(1).mean(1).chunk(2)
        assert (new_l - new_w > l - w).all(), setting
        metrics = method.metrics(out)
        assert metrics["mse_w"] == pytest.approx(float(w.mean()))
        assert metrics["mse_l"] == pytest.approx(float(l.mean()))


def test_styles() -> None:
    images = load_splits().heldout.images
    assert images.shape == (257, 1, 16, 16)
    assert images.abs().max() <= 1
    styled = {style: restyle(images, style) for style in STYLES}
    assert torch.equal(styled["invert"], -images)
    assert (styled["thick"] >= images).all()
    ink = [float((picture + 1).sum()) for picture in (styled["shear"], images)]
    assert ink[0] == pytest.approx(ink[1], rel=0.03)  # moved, not lost
    assert (styled["shear"] - images).abs().mean() > 0.05
    with pytest.raises(ValueError, match="style is 'bold'"):
        restyle(images, "bold")


def test_splits_share_no_digit() -> None:
    splits = load_splits()
    assert [len(part.labels) for part in splits] == [900, 640, 257]
    again = load_splits()
    assert torch.equal(splits.heldout.images, again.heldout.images)


def test_noise_has_the_variance_of_the_schedule() -> None:
    zeros, noise = torch.zeros(2, 1, 16, 16), torch.ones(2, 1, 16, 16)
    noisy = add_noise(zeros, noise, torch.tensor([0, 999]))
    assert noisy[0].mean() == pytest.approx(0.01, rel=1e-3)  # sqrt(beta_0)
    assert noisy[1].mean() == pytest.approx(float((1 - ALPHAS[999]).sqrt()))
    assert ALPHAS[999] < 1e-4


def test_frechet_distance_of_known_sets() -> None:
    a = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet(a, a + 3) == pytest.approx(8 * 9, rel=1e-4)
    cov = torch.cov(a.double().T).trace()
    assert frechet(a, 3 * a) == pytest.approx(
        float(4 * cov + 4 * a.mean(0).square().sum()), rel=1e-3
    )


def test_spread_is_within_a_digit() -> None:
    images = torch.zeros(40, 1, 16, 16)
    images[::2] = 1.0
    labels = torch.arange(40) % 10
    assert spread(Digits(images, labels)) == 0  # each digit is of one kind only
    labels = torch.arange(40) // 4
    assert spread(Digits(images, labels)) == pytest.approx(16 * 2 / 3)


def test_choice_of_a_setting() -> None:
    """The nearest of the best few; and trials of another grid are refused."""
    settings = [describe(setting) for setting in METHODS["SFT"].settings]
    scores = [(0.90, 10), (0.99, 50), (0.98, 40), (0.50, 5)]
    trials = [
        {"style": "none", "method": "SFT", "setting": s, "joint": str(j), "frechet": str(f)}
        for s, (j, f) in zip(settings, scores, strict=True)
    ]
    assert choose(trials) == {("none", "SFT"): METHODS["SFT"].settings[2]}
    with pytest.raises(ValueError, match="the trials of SFT"):
        choose(trials[:3])


def test_the_trials_in_the_repository_are_those_of_the_methods() -> None:
    best = choose(read_trials())
    everywhere = [*MAIN, "KTO", "RankDPO", "DSPO"]
    for style in ("none", "thick", "invert"):
        assert {(style, name) for name in everywhere} <= set(best)
    assert {("invert", name) for name in METHODS} <= set(best)


GOOD: dict[str, Any] = {"joint": 0.9, "digit": 0.9, "frechet": 40.0, "floor": 15.0}
BEST = {
    (style, method): METHODS[method].settings[0]
    for style in ("none", "thick", "invert")
    for method in ("MaPO", "DPO")
}
TRIED = [{"style": "invert", "method": "DPO", "setting": "lr=1", "joint": "0.2"}]


def made_up(**changed: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of two seeds in which everything holds, but for what `changed` says of a style."""
    rows = []
    dpo = {"none": 40.0, "thick": 80.0, "invert": 400.0}
    blank: dict[str, Any] = dict.fromkeys(
        ("diversity", "accuracy", "accuracy_ref", "mse_w", "mse_l", "ref_mse_w", "seconds"), 0.5
    )
    for seed in (1, 2):
        for (style, method), setting in BEST.items():
            for steps in (200, 600) if (style, method) == ("invert", "MaPO") else (200,):
                row: dict[str, Any] = {
                    "style": style,
                    "method": method,
                    "seed": seed,
                    "steps": steps,
                }
                row |= {"setting": describe(setting), **blank, **GOOD}
                if method == "DPO":
                    row |= {"frechet": dpo[style]}
                    row |= {"joint": 0.1} if style == "invert" else {}
                rows.append(row | changed.get(f"{style}_{method}_{steps}", {}))
    base: dict[str, Any] = {"method": "base", "seed": 0, "steps": 0, "setting": "", **blank, **GOOD}
    far = {"style": "invert", "frechet": 8523.0}
    return [*rows, {**base, "style": "none", **changed.get("base", {})}, {**base, **far}]


def holds(rows: list[dict[str, Any]], judge: float = 0.98, trial: float = 0.2) -> list[bool | None]:
    trials = [{**TRIED[0], "joint": str(trial)}]
    findings = check(rows, trials, {"none": judge, "invert": 0.99}, BEST)
    assert len(report(rows, findings, BEST).splitlines()) > len(findings)
    return [finding.holds for finding in findings]


def test_checks_pass_where_all_is_well() -> None:
    assert holds(made_up()) == [True] * 7


@pytest.mark.parametrize(
    ("which", "arguments"),
    [
        (0, {"judge": 0.96}),
        (1, {"rows": made_up(base={"digit": 0.84})}),
        (2, {"rows": made_up(invert_MaPO_600={"joint": 0.79})}),
        (2, {"rows": made_up(invert_MaPO_600={"frechet": 45.1})}),
        (3, {"trial": 0.26}),
        (4, {"rows": made_up(invert_DPO_200={"joint": 0.24}, invert_MaPO_200={"joint": 0.58})}),
        (5, {"rows": made_up(none_DPO_200={"joint": 0.83})}),
        (5, {"rows": made_up(none_DPO_200={"joint": 0.97})}),
        (6, {"rows": made_up(thick_MaPO_200={"frechet": 81.0})}),
        (6, {"rows": made_up(invert_MaPO_200={"frechet": 250.0})}),
    ],
)
def test_a_check_fails_where_its_claim_does(which: int, arguments: dict[str, Any]) -> None:
    expected: list[bool | None] = [True] * 7
    expected[which] = False
    assert holds(**{"rows": made_up(), **arguments}) == expected


def test_checks_without_their_runs_say_so() -> None:
    rows = [row for row in made_up() if row["method"] == "base"]
    assert holds(rows) == [True, True, None, None, None, None, None]


@pytest.mark.parametrize(("joint", "code"), [(0.9, 0), (0.7, 1)])
def test_a_failed_check_is_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, world: World, joint: float, code: int
) -> None:
    records = []
    for row in made_up(none_MaPO_200={"joint": joint}):
        setting = BEST.get((row["style"], row["method"]), {})
        run = Run(row["style"], row["method"], setting, row["seed"], row["steps"])
        records.append({"run": run._asdict(), "result": {**row, "in_style": 1.0, "ref_mse_l": 0.5},
                        "history": [], "pictures": []})  # fmt: skip
    monkeypatch.setattr(mismatch_study, "carry_out", lambda args, runs: records)
    monkeypatch.setattr(mismatch_study, "read_trials", lambda path: TRIED)
    monkeypatch.setattr(mismatch_study, "choose", lambda trials: {**BEST, **MORE})
    monkeypatch.setattr(mismatch_study, "load_world", lambda *arguments: world)
    monkeypatch.setattr(mismatch_study, "judge_accuracy", lambda world: {"none": 0.98})
    monkeypatch.setattr(mismatch_study, "draw", lambda *arguments: None)
    assert mismatch_study.main(["--output_dir", str(tmp_path)]) == code
    assert "FAILS" in (tmp_path / "table.txt").read_text() or code == 0
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + len(records)


MORE = {
    (style, method): MAIN[method].settings[0]
    for style in ("none", "thick", "invert")
    for method in MAIN
    if (style, method) not in BEST
}


def test_plans() -> None:
    """Three styles, five methods, three seeds; the same number of trials for each method."""
    best = {**BEST, **MORE}
    plan = mismatch_study.plan_study(mismatch_study.parse_args([]), best)
    counted = [r for r in plan if r.steps == 200 and r.setting == best[r.style, r.method]]
    assert len(counted) == len({run.name for run in counted}) == 3 * 5 * 3
    assert {run.samples for run in plan} == {1000}
    assert len({run.noise_seed for run in plan}) == 1
    assert {run.name for run in mismatch_study.gallery_runs(1)} <= {run.name for run in plan}
    quick = mismatch_study.plan_study(mismatch_study.parse_args(["--quick"]), best)
    assert len(quick) == 3 + 15
    trials = mismatch_study.plan_tuning(mismatch_study.parse_args([]))
    counts = [sum(run.method == name for run in trials) for name in MAIN]
    assert counts == [3 * TRIALS] * 5
    assert not {run.seed for run in trials} & {run.seed for run in plan if run.steps}
    with pytest.raises(ValueError, match="not tuned"):
        mismatch_study.plan_study(mismatch_study.parse_args(["--methods", "CaPO"]), best)


def test_a_killed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runs" / "one.json"
    write_whole(path, b"{}")

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, json.dumps({"half": 1}).encode())
    assert path.read_bytes() == b"{}"


@pytest.mark.slow
def test_guided_models_of_the_study(folder: Path, world: World, tmp_path: Path) -> None:
    """All rows of a small job, and what must be equal to another model's pictures."""
    small = {name: SMALL[name] for name in ("base_steps", "judge_steps")}
    job = guidance_study.Job("none", 1, samples=20, steps=2, **small)
    rows = guidance_study.do(folder, job, "cpu")
    assert len({(row["model"], row["guidance"]) for row in rows}) == len(rows) == 17
    guidance_study.write_rows(tmp_path / "rows.csv", rows)
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 18
    guidance_study.plot(rows * 2, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert guidance_study.table_of(rows * 2).count("±") == 4 * 17

    other = UNet().requires_grad_(False)
    with torch.no_grad():
        for parameter in other.head.parameters():
            parameter.normal_()
    labels, noise = torch.arange(3), torch.randn(3, 1, 16, 16)
    seen = []

    def schedule(x: float) -> float:
        seen.append(x)
        return 0.5

    guided = {
        "draft": guidance_study.annealed(other, world.base, AnnealedGuidance("draft")),
        "base": guidance_study.annealed(other, world.base, AnnealedGuidance("base")),
        "own": guidance_study.annealed(other, world.base, AnnealedGuidance(schedule)),
        "g 1": guidance_study.led_away(other, world.base, 1.0),
        "g .5": guidance_study.led_away(other, world.base, 0.5),
    }
    found = {name: paint(model, labels, noise) for name, model in guided.items()}
    torch.testing.assert_close(found["draft"], paint(other, labels, noise))
    torch.testing.assert_close(found["base"], paint(world.base, labels, noise))
    torch.testing.assert_close(found["g 1"], found["draft"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found["g .5"], found["own"], rtol=1e-3, atol=1e-4)
    assert seen == [i / 25 for i in range(25)]
