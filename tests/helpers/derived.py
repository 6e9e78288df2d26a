"""What follows from the functions in fastpref/losses/: the classes in fastpref/modules.py and the
README's table of losses.

`python tests/helpers/derived.py` writes them; tests/project/test_derived.py fails where that would
change anything.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
from fastpref import losses  # noqa: E402
from fastpref.dispatch import MissingReference  # noqa: E402
from fastpref.modules import STEP, positional_of, zeros_of  # noqa: E402
from fastpref_kernels import LINKS  # noqa: E402

LOSSES: dict[str, Callable[..., Any]] = {
    name: getattr(losses, name) for name in vars(losses)["__all__"] if name.endswith("_loss")
}
PAIRS = [name for name, function in LOSSES.items() if function.__module__ == losses.pairs.__name__]
STEPS = [name for name, function in LOSSES.items() if function.__module__ == losses.steps.__name__]
OTHERS = [name for name in LOSSES if name not in (*PAIRS, *STEPS)]
MODULES = ROOT / "fastpref" / "modules.py"
README = ROOT / "README.md"
MARK = "# What follows is written by tests/helpers/derived.py, from the functions in losses/.\n"
HEADER = "| function | loss | margin | needs | beta |\n|---|---|---|---|---|\n"
STEP_HEADER = "| function | loss | needs |\n|---|---|---|\n"


def class_name(function: str) -> str:
    """DPOLoss of dpo_loss: each word as the first paragraph of its docstring spells it."""
    first = (LOSSES[function].__doc__ or "").split("\n\n")[0]
    words = []
    for word in function.removesuffix("_loss").split("_"):
        spelt = re.findall(rf"(?<![a-z]){word}(?![a-z])", first, re.IGNORECASE)
        words.append(next((each for each in spelt if each != word), word.capitalize()))
    return "".join(words) + "Loss"


def declared(parameter: inspect.Parameter) -> str:
    annotation = parameter.annotation.replace("'", '"')
    if parameter.kind is parameter.VAR_KEYWORD:
        return f"**{parameter.name}: {annotation}"
    if parameter.default is parameter.empty:
        return f"{parameter.name}: {annotation}"
    value = parameter.default
    default = json.dumps(value) if isinstance(value, str) else repr(value)
    return f"{parameter.name}: {annotation} = {default}"


CLASS = """

class {name}(LossModule):
    \"""`{function}` as a module.\"""

    function = losses.{function}
    knobs = {knobs}

    def __init__(
        {declared}
    ) -> None:
        super().__init__(
            {passed}
        )

    if TYPE_CHECKING:

        def __call__(
            {in_call}
        ) -> {output}: ...
"""


def a_class(function: str) -> str:
    """The module of a loss: its options at construction, and its tensors in a call."""
    parameters = [*inspect.signature(LOSSES[function]).parameters.values()]
    *options, knobs = (p for p in parameters if p.name not in STEP)
    in_call = [p for p in parameters if p.name in STEP or p.kind is p.POSITIONAL_OR_KEYWORD]
    at = next((i for i, p in enumerate(in_call) if p.kind is p.KEYWORD_ONLY), len(in_call))
    star = ["*"] if at < len(in_call) else []
    return CLASS.format(
        name=class_name(function),
        function=function,
        output=inspect.signature(LOSSES[function]).return_annotation,
        knobs=knobs.annotation.removeprefix("Unpack[").removesuffix("]"),
        declared=lines(8, "self", "*", *map(declared, options), declared(knobs)),
        passed=lines(12, *(f"{p.name}={p.name}" for p in options), "**knobs"),
        in_call=lines(
            12,
            "self",
            *[*map(declared, in_call[:at]), *star, *map(declared, in_call[at:])],
            "**options: Any",
        ),
    )


def lines(indent: int, *each: str) -> str:
    return f",\n{' ' * indent}".join(each) + ","


def modules() -> str:
    """The text of fastpref/modules.py."""
    by_hand, _ = MODULES.read_text().split(MARK)
    names = "".join(f'    "{name}",\n' for name in sorted(map(class_name, LOSSES)))
    return f"{by_hand}{MARK}{''.join(map(a_class, LOSSES))}\n\n__all__ = [\n{names}]\n"


def formula(function: str, quantity: str) -> str:
    """What the docstring says of "loss" or "margin", in Python."""
    found = re.search(rf"^ +{quantity} += (.+)$", LOSSES[function].__doc__ or "", re.MULTILINE)
    assert found, f'{function}\'s docstring has no line "{quantity} = ..."'
    return re.sub(r"(?<=\w)/(?=\w)", " / ", found[1].strip()).replace("^", " ** ")


def needs(function: str) -> str:
    """What a call at the defaults cannot do without, besides predictions and targets."""
    step = zeros_of(LOSSES[function])
    of_own = [name for name in step if name not in ("model_pred", "target")]
    try:
        LOSSES[function](**step)
    except MissingReference:
        return ", ".join(["ref", *of_own])
    return ", ".join(of_own)


def default_beta(function: str) -> str:
    parameters = inspect.signature(LOSSES[function]).parameters
    if "beta" not in parameters:
        return ""
    beta = parameters["beta"].default
    if beta is None:  # each type has its own
        name = f"{function.removesuffix('_loss')}_{parameters['loss_type'].default}"
        beta = LINKS[name].hyper["beta"].default
    return f"{beta:g}"


def a_row(function: str) -> str:
    cells = (
        f"`{function}`", f"`{formula(function, 'loss')}`", f"`{formula(function, 'margin')}`",
        needs(function), default_beta(function),
    )  # fmt: skip
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|\n"


def a_step_row(function: str) -> str:
    needed = (name for name in positional_of(LOSSES[function]) if name != "model_pred")
    return f"| `{function}` | `{formula(function, 'loss')}` | {', '.join(needed)} |\n"


def readme() -> str:
    """The text of README.md."""
    before, table, others = README.read_text().split(HEADER)
    others, steps = others.split(STEP_HEADER)
    others = "".join(map(a_row, OTHERS)) + others[others.index("\n\n") + 1 :]
    steps = "".join(map(a_step_row, STEPS)) + steps[steps.index("\n\n") + 1 :]
    table = "".join(map(a_row, PAIRS)) + table[table.index("\n\n") + 1 :]
    return HEADER.join((before, table, STEP_HEADER.join((others, steps))))


if __name__ == "__main__":
    for path, text in ((MODULES, modules()), (README, readme())):
        if text != path.read_text():
            path.write_text(text)
            print(f"{path.relative_to(ROOT)} was written anew")
