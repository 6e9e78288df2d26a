"""The trainer's arguments: spellings, help, YAML files, recipes, and what is said of a mistake."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from small_run import ROOT, SCORES, Train, argv
from trainer import entry
from trainer.args import ARGS_FILE, TrainingArguments, parse_args, save_args
from trainer.checks import PACKAGES
from trainer.entry import one_line_errors
from trainer.metrics import read_metrics

NEEDED = ["--pretrained_model_name_or_path", "base", "--dataset_name", "pairs"]
TRAINER = str(ROOT / "examples" / "train_sdxl.py")
RECIPES = sorted((ROOT / "examples" / "configs" / "recipes").glob("*.yaml"))
FAST = ("mapo_sdxl", "inpo_sdxl", "linear_dpo_sd15", "dcpo_sd21", "flow_dpo_sd3")  # in make test
MODELS = {"sdxl": "epsilon", "sd15": "sd15", "sd21": "sd15", "sd3": "sd3"}  # of small_run


def parse(*words: str) -> TrainingArguments:
    return parse_args([*NEEDED, *words])


def written(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


# The command line.


def test_arguments_are_one_object_that_can_be_copied() -> None:
    args = parse("--learning_rate", "1e-4", "--image_columns", "a", "b")
    assert (args.learning_rate, args.image_columns, args.resolution) == (1e-4, ["a", "b"], [1024])
    assert (args.loss, args.output_dir, args.random_flip) == ("mapo", "sdxl-mapo", True)
    for copy in (
        dataclasses.replace(args, seed=3),
        argparse.Namespace(**vars(args) | {"seed": 3}),
    ):
        assert (copy.seed, copy.learning_rate) == (3, 1e-4)
    parse().resolution.append(5)
    assert parse().resolution == [1024]


@pytest.mark.parametrize("name", ["random{}flip", "scale{}lr"])
def test_spellings_of_a_switch(name: str) -> None:
    for mark in "_-":
        flag, dest = name.format(mark), name.format("_")
        assert getattr(parse(f"--{flag}"), dest) is True
        assert getattr(parse(f"--{flag}", f"--no-{flag}"), dest) is False
        assert getattr(parse(f"--{flag}", f"--no_{flag}"), dest) is False


def test_dashes_are_underscores_and_the_last_word_counts() -> None:
    args = parse("--lora-rank=4", "--validation-prompts", "a cat", "a dog", "--lora_rank", "8")
    assert (args.lora_rank, args.validation_prompts) == (8, ["a cat", "a dog"])
    assert parse("--hub_private_repo", "--push_to_hub", "--hub_model_id", "me/x").hub_private_repo
    assert parse().hub_private_repo is None


def test_help_shows_groups_and_each_flag_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_args(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    titles = re.findall(r"^([a-z ]+):$", text, re.MULTILINE)
    assert titles == [
        "options", "model", "data", "loss", "inversion", "optimization", "memory and precision",
        "monitoring", "output",
    ]  # fmt: skip
    listed = re.findall(r"^  --(\w+)", text, re.MULTILINE)
    assert listed == ["config", *(field.name for field in dataclasses.fields(TrainingArguments))]
    flat = " ".join(text.split())
    for part in (
        "--learning_rate LEARNING_RATE after warm-up (MaPO) (default: 1e-05)",
        "--score_range LOW HIGH smpo",
        "--random_flip, --no-random_flip mirror half of the pairs (MaPO) (default: True)",
        "--beta BETA strength of the preference [budget_dpo 5000.0,",
    ):
        assert part in flat
    assert "(default: None)" not in flat


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr", "3"], "unrecognized arguments: --lr 3"),
        (["--learning", "3"], "unrecognized arguments: --learning 3"),
        (["--streaming", "maybe"], "unrecognized arguments: maybe"),
        (["--learning_rate", "fast"], "argument --learning_rate: invalid float value: 'fast'"),
        (["--score_range", "1"], "argument --score_range: expected 2 arguments"),
        (["--loss", "ppo"], "argument --loss: invalid choice: 'ppo'"),
        (["--lr_scheduler", "piecewise_constant"], "argument --lr_scheduler: invalid choice"),
        (["--config", "a", "--config", "b"], "--config came 2 times; need one file"),
    ],
)
def test_a_word_that_argparse_refuses_is_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*words)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f": error: {message}" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--optimizer prodigy", "--optimizer prodigy needs prodigyopt, which is not installed"),
        ("--use_8bit_adam", "--optimizer adamw_8bit needs bitsandbytes, which is not installed"),
        ("--use_8bit_adam --optimizer adafactor", "--use_8bit_adam came with --optimizer adafact"),
        ("--optimizer adafactor --adam_beta1 0.8", "--adam_beta1 came, but --optimizer adafactor"),
        ("--lr_warmup_steps 5", "--lr_scheduler constant has no warm-up; need constant_with_w"),
        ("--report_to wnadb", "--report_to is wnadb; need one of none, all"),
    ],
)
def test_a_choice_that_cannot_work_is_refused(
    monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    monkeypatch.setattr("trainer.checks.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        parse(*words.split())


def test_8_bits_have_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.checks.PACKAGES", {})
    for words in (["--use_8bit_adam"], ["--use_8bit_adam", "--optimizer", "adamw_8bit"]):
        args = parse(*words)
        assert (args.optimizer, args.use_8bit_adam) == ("adamw_8bit", False)


def test_a_long_prompt_is_no_path() -> None:
    assert parse("--validation_prompts", "cat " * 300).validation_prompts == ["cat " * 300]


# YAML files.


def test_a_file_comes_before_defaults_and_after_the_command_line(tmp_path: Path) -> None:
    text = """
        pretrained_model_name_or_path: base  # required, and enough here
        dataset_name: 007
        learning_rate: 1e-5
        mixed_precision: no
        adam_beta1: null
        seed:
        random_flip: false
        streaming: yes
        resolution: 512
        score_range: [0, .inf]
        score_columns:
        - a
        - b
        loss: smpo
        max_train_steps: 7
    """
    path = written(tmp_path, text)
    args = parse_args(["--max_train_steps", "9", "--config", path, "--no-streaming"])
    assert (args.pretrained_model_name_or_path, args.dataset_name) == ("base", "007")
    assert (args.learning_rate, args.mixed_precision, args.resolution) == (1e-5, "no", [512])
    assert (args.adam_beta1, args.seed, args.max_train_steps) == (0.9, 0, 9)
    assert (args.random_flip, args.streaming) == (False, False)
    assert (args.score_range, args.score_columns) == ([0, float("inf")], ["a", "b"])
    assert parse_args([f"--config={path}", "--dataset_name", "other"]).dataset_name == "other"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1", "line 1: lerning_rate is no flag; did you mean learning_rate?"),
        ("a: b", "line 1: a is no flag; need a flag's name"),
        ("--seed: 1", "line 1: --seed is no flag; did you mean seed?"),
        ("config: x", "line 1: config is no flag"),
        ("seed: 1\n\nseed: 2", "line 3: seed came twice; need it once"),
        ("seed: 1\nlearning_rate: fast", "line 2: learning_rate is fast; need a number"),
        ("learning_rate: true", "learning_rate is true; need a number"),
        ("learning_rate: [1, 2]", "learning_rate is 1, 2; need one value"),
        ("learning_rate: {a: 1}", "learning_rate is no value; need one value"),
        ("train_batch_size: 2.5", "train_batch_size is 2.5; need a whole number"),
        ("streaming: maybe", "streaming is maybe; need true or false"),
        ("streaming: [true]", "streaming is true; need one value"),
        ("loss: ppo", "loss is ppo; need one of budget_dpo, capo"),
        ("score_range: [1]", "score_range is 1; need a list of 2 values"),
        ("score_range: 1", "score_range is 1; need a list of 2 values"),
        ("resolution: []", "resolution is no value; need a list of values"),
        ("resolution: [1, [2]]", "resolution is 1; need a list of values"),
        ("seed: -1", "--seed is -1; need 0 or more"),
        ("- seed", "run.yaml, which holds no mapping; need lines of NAME: VALUE"),
        ("", "run.yaml, which holds no mapping"),
        ("seed: 1: 2", "run.yaml, which is no YAML: mapping values are not allowed here"),
        ("seed: 1\n---\nseed: 2", "run.yaml, which is no YAML: expected a single document"),
    ],
)
def test_a_file_with_a_mistake(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parse("--config", written(tmp_path, text))
    assert "--seed" in message or str(tmp_path / "run.yaml") in str(caught.value)


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--config is nowhere\.yaml: No such file or directory"):
        parse("--config", "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes("caption_column: é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.yaml, which is no YAML: .* can't decode byte"):
        parse("--config", str(tmp_path / "latin.yaml"))


def test_saved_arguments_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [
        "null",
        "1e5",
        "a: b # c",
        "- cat",
        "-cat",
        "x" * 400,
        "naïve 猫",
        " two  spaces ",
        "é",
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    args = parse(
        "--validation_prompts", str(tmp_path / "prompts.txt"), "--max_grad_norm", "inf",
        "--revision", "1.0", "--no-random_flip", "--hub_token", "hf_secret", "--report_to", "none",
        "--hub_model_id", "true", "--loss", "smpo", "--score_columns", "no", "~",
    )  # fmt: skip
    save_args(args, tmp_path)
    assert "hf_secret" not in (tmp_path / ARGS_FILE).read_text()
    assert vars(parse_args(["--config", str(tmp_path / ARGS_FILE)])) == vars(args)
    assert {path.name for path in tmp_path.iterdir()} == {ARGS_FILE, "prompts.txt"}


def test_a_run_leaves_its_arguments(train: Train) -> None:
    folder = train(max_train_steps=1, lora_rank=2)
    again = parse_args(["--config", str(folder / ARGS_FILE)])
    assert (again.lora_rank, again.mixed_precision, again.output_dir) == (2, "no", str(folder))


# Recipes.


def without_needs(recipe: Path) -> dict[str, Any]:
    """Flags by which a recipe needs neither a GPU nor an optional package."""
    own = yaml.safe_load(recipe.read_text())
    flags = SCORES if "score_columns" in own else {}
    if "loser_caption_column" in own:
        flags = flags | {"caption_column": "caption", "loser_caption_column": "worse_caption"}
    if own["optimizer"] in PACKAGES:
        flags = flags | {"optimizer": "adamw"}
    return flags | {"mixed_precision": "no"}


def read(recipe: Path) -> TrainingArguments:
    flags = without_needs(recipe).items()
    words = [str(w) for k, v in flags for w in (f"--{k}", *(v if isinstance(v, tuple) else (v,)))]
    return parse_args(["--config", str(recipe), *words])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_is_read_and_says_where_it_is_from(recipe: Path) -> None:
    read(recipe)
    head = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    text = " ".join(line.lstrip("# ") for line in head)
    assert re.search(r"Source: .* Different here: .* Not run here on the real model\.", text)


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(recipe, marks=[] if recipe.stem in FAST else [pytest.mark.slow])
        for recipe in RECIPES
    ],
    ids=lambda recipe: recipe.stem,
)
def test_a_recipe_trains(train: Train, recipe: Path) -> None:
    meant = vars(read(recipe))
    model = MODELS[recipe.stem.rpartition("_")[2]]
    folder = train(
        model=model, config=recipe, max_train_steps=2, learning_rate=meant["learning_rate"],
        **without_needs(recipe),
    )  # fmt: skip
    assert len(read_metrics(folder / "metrics.jsonl")) == 2
    ran = vars(parse_args(["--config", str(folder / ARGS_FILE)]))
    assert {name for name in meant if ran[name] != meant[name]} <= {
        "pretrained_model_name_or_path", "dataset_name", "cache_dir", "output_dir", "resolution",
        "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "report_to",
    }  # fmt: skip


# Mistakes.


def outcome(error: BaseException, capsys: pytest.CaptureFixture[str]) -> str:
    """What is printed of an error at the outermost layer, which exits with 2."""
    with pytest.raises(SystemExit) as caught, one_line_errors():
        raise error
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_our_own_errors_are_one_line_and_bugs_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["examples/demo.py"])
    with pytest.raises(ValueError, match="of a test"), one_line_errors():
        raise ValueError("of a test, which is not this project's")
    monkeypatch.setattr(entry, "EXAMPLES", Path(__file__).parent)
    assert outcome(ValueError("bad\n  value"), capsys) == "demo.py: error: bad value\n"
    assert outcome(FloatingPointError("not finite"), capsys) == "demo.py: error: not finite\n"
    for bug in ("int('x')", "1 / 0", "None + 1", "open('nowhere')"):
        with pytest.raises((ValueError, ArithmeticError, TypeError, OSError)), one_line_errors():
            eval(compile(bug, __file__, "eval"))
    with pytest.raises(KeyError), one_line_errors():
        raise KeyError("no mistake of a user")
    assert capsys.readouterr().err == ""


def test_a_base_that_cannot_be_loaded_is_one_line(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught, one_line_errors():
        train(pretrained_model_name_or_path="nowhere")
    assert caught.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "nowhere does not appear to have a file named model_index.json" in line


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
                   "ACCELERATE_USE_CPU": "true", "TRANSFORMERS_VERBOSITY": "error"}  # fmt: skip
    command = [sys.executable, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_as_a_program_it_prints_one_line_and_exits_with_2() -> None:
    done = run(TRAINER, *NEEDED, "--max_train_steps", "0")
    assert done.returncode == 2
    assert done.stderr == "train_sdxl.py: error: --max_train_steps is 0; need more than 0\n"


def test_one_of_two_processes_says_it(world: Path, tmp_path: Path) -> None:
    for side in "wl":
        (tmp_path / "photos" / side).mkdir(parents=True)
        (tmp_path / "photos" / side / "1.png").write_bytes(b"broken")
    (tmp_path / "photos" / "w" / "1.txt").write_text("a cat")
    words = argv(world, tmp_path / "run", dataset_name=tmp_path / "photos")
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", TRAINER, *words)
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1
    assert lines[0].startswith("train_sdxl.py: error: 1 of 1 pairs (100.0%) have a bad image")
    assert "[rank1]" not in done.stderr
    assert re.search(r"Root Cause.*exitcode\s*: 2 ", done.stderr, re.DOTALL)
