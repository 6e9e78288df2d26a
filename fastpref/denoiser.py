"""The call of a pipeline's denoiser, taken over for a while: at which step it comes, and what else
than the denoiser answers it, another model or the same with other adapters."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from .arguments import real_number

Other: TypeAlias = "nn.Module | str | Sequence[str] | Mapping[str, float]"
Call: TypeAlias = Callable[..., Any]

# Of nn.Module: what `model(...)` calls, if it is set. It is `model.compile()`'s, and the one place
# that accelerate's and diffusers' hooks, which replace `forward`, never touch; they do so again at
# the end of each call of an offloaded pipeline.
CALL = "_compiled_call_impl"


class Place:
    """Where the pipeline is in its steps; known on the host, from calls of its scheduler.

    step: from 0. rows: of the denoiser's last call, if they are to be twice those of the step.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.scheduler = pipe, pipe.scheduler
        self.step, self.rows = 0, 0

    def count(self) -> int:
        """Of steps. The pipeline knows its own, but not before it has begun."""
        if self.pipe.scheduler is not self.scheduler:
            raise ValueError("pipe.scheduler is another one now; need one set before `applied`")
        n = getattr(self.pipe, "num_timesteps", None) or len(self.scheduler.timesteps)
        if self.step >= n:
            raise ValueError(f"the scheduler is in step {self.step + 1}, but pipe has {n}")
        return n

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Count while the scheduler works."""
        step, set_timesteps = self.scheduler.step, self.scheduler.set_timesteps

        # Pipelines read the signatures of both, which `wraps` keeps.
        @functools.wraps(step)
        def counted(*args: Any, **kwargs: Any) -> Any:
            output = args[0] if args else kwargs["model_output"]
            if self.rows not in (0, 2 * len(output)):
                raise ValueError(
                    f"pipe sent {self.rows} rows to its denoiser last and goes on with "
                    f"{len(output)}; need one call of twice as many, [negative, positive]"
                )
            result = step(*args, **kwargs)
            self.step += 1
            return result

        @functools.wraps(set_timesteps)
        def restarted(*args: Any, **kwargs: Any) -> Any:
            self.step = self.rows = 0
            return set_timesteps(*args, **kwargs)

        with (
            _replaced(self.scheduler, "step", counted),
            _replaced(self.scheduler, "set_timesteps", restarted),
        ):
            yield


@contextmanager
def guided(
    pipe: Any, name: str, other: Other, combine: Callable[[Place, Call, Call, Any, Any], Any]
) -> Iterator[None]:
    """Every call of the pipeline's denoiser goes through
    ``combine(place, denoiser, other, args, kwargs)``."""
    model = _denoiser(pipe)
    before = vars(model).get(CALL)
    if hasattr(before, "guides"):
        raise ValueError("pipe's denoiser is guided already; need one guidance at a time")
    own: Call = before or model._call_impl
    place = Place(pipe)

    def call(*args: Any, **kwargs: Any) -> Any:
        return combine(place, own, run_other, args, kwargs)

    call.guides = name  # type: ignore[attr-defined]
    running = _running(name, other, model, own)
    with running as run_other, place.followed(), _replaced(model, CALL, call):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of this instance alone, past any __setattr__."""
    had = name in vars(owner)
    before = vars(owner).get(name)
    vars(owner)[name] = value
    try:
        yield
    finally:
        if had:
            vars(owner)[name] = before
        else:
            del vars(owner)[name]


@contextmanager
def _running(name: str, other: Other, model: nn.Module, own: Call) -> Iterator[Call]:
    """What calls the other model; if it is the same with other adapters, these are switched."""
    if isinstance(other, nn.Module):
        if other is model:
            raise ValueError(f"{name} is pipe's own denoiser; need another model, or adapters")
        dtypes = [getattr(each, "dtype", None) for each in (other, model)]
        if None not in dtypes and dtypes[0] != dtypes[1]:
            raise ValueError(f"{name} has dtype {dtypes[0]}; need pipe's, {dtypes[1]}")
        yield other
        return
    if getattr(model, "is_cache_enabled", False):
        raise ValueError("pipe's denoiser caches, for one model; need disable_cache() before")
    wanted = _adapters(name, other, model)
    learning = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def switched(*args: Any, **kwargs: Any) -> Any:
        before = [(layer, _State.of(layer)) for layer, _ in wanted]
        try:
            for layer, state in wanted:
                state.put_on(layer)
            return own(*args, **kwargs)
        finally:
            for layer, state in before:
                state.put_on(layer)

    try:
        yield switched
    finally:
        for parameter, learns in learning:  # peft sets it wherever it switches
            if parameter.requires_grad != learns:
                parameter.requires_grad_(learns)


class _State(NamedTuple):
    """That of one of peft's layers: whether adapters are on, which (None: as it is), and scales."""

    on: bool
    names: list[str] | None
    scales: dict[str, float]

    @classmethod
    def of(cls, layer: Any) -> _State:
        return cls(not layer.disable_adapters, [*layer.active_adapters], dict(layer.scaling))

    def put_on(self, layer: Any) -> None:
        if self.names is not None and layer.active_adapters != self.names:
            layer.set_adapter(self.names)
        layer.scaling.update(self.scales)
        if layer.disable_adapters == self.on:
            layer.enable_adapters(self.on)


def _adapters(name: str, other: Other, model: nn.Module) -> list[tuple[Any, _State]]:
    """peft's layers in the model, each with the state that it needs for `other`."""
    weights: Mapping[str, float]
    if isinstance(other, Mapping):
        weights = other
    else:
        assert not isinstance(other, nn.Module)
        weights = dict.fromkeys([other] if isinstance(other, str) else other, 1.0)
    layers: list[Any] = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "scaling", None), dict) and hasattr(module, "set_scale")
    ]
    known = sorted({key for layer in layers for key in layer.scaling})
    missing = [key for key in weights if key not in known]
    if missing or not known:
        has = ", ".join(known) or "none"
        what = f"is of adapter {missing[0]!r}" if missing else "is pipe's model without adapters"
        raise ValueError(f"{name} {what}, but the adapters of pipe's model are: {has}")
    if any(layer.merged for layer in layers):
        raise ValueError(f"adapters of pipe's model are fused; {name} needs unfuse_lora() before")
    if not weights and not any(s.on and s.names for s in map(_State.of, layers)):
        raise ValueError(f"{name} is pipe's model without adapters, but they are off already")
    wanted = []
    for layer in layers:
        before = _State.of(layer)
        for key, weight in weights.items():
            layer.set_scale(key, weight)
        scales = {key: layer.scaling[key] for key in weights if key in layer.scaling}
        layer.scaling.update(before.scales)
        wanted.append((layer, _State(bool(weights), [*weights] or None, scales)))
    return wanted


def _denoiser(pipe: Any) -> nn.Module:
    for name in ("unet", "transformer"):
        model = getattr(pipe, name, None)
        if model is None:
            continue
        if not isinstance(model, nn.Module):
            raise TypeError(f"pipe.{name} is a {type(model).__name__}; need a torch.nn.Module")
        if getattr(pipe, f"{name}_2", None) is not None:
            raise ValueError(f"pipe has {name} and {name}_2; need one denoiser")
        scheduler = getattr(pipe, "scheduler", None)
        if not (hasattr(scheduler, "step") and hasattr(scheduler, "set_timesteps")):
            raise TypeError(f"pipe.scheduler is a {type(scheduler).__name__}; need a scheduler")
        return model
    raise TypeError(f"pipe is a {type(pipe).__name__} without unet or transformer; need a pipeline")


def prediction(output: Any) -> Tensor:
    """Of a tensor, a tuple, or diffusers' output."""
    return output if isinstance(output, Tensor) else output[0]


def with_prediction(output: Any, prediction: Tensor) -> Any:
    if isinstance(output, Tensor):
        return prediction
    if isinstance(output, tuple):
        return (prediction, *output[1:])
    output.sample = prediction
    return output


def halves(place: Place, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of a denoiser for the negative rows and for the positive ones."""
    latents = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
    if not isinstance(latents, Tensor) or latents.dim() == 0 or len(latents) % 2:
        got = f"shape {tuple(latents.shape)}" if isinstance(latents, Tensor) else type(latents)
        raise ValueError(f"pipe's denoiser got latents of {got}; need rows of [negative, positive]")
    place.rows = len(latents)
    return _cut((args, kwargs), place.rows)


def _cut(value: Any, rows: int) -> tuple[Any, Any]:
    """Tensors that have as many rows are cut in two, wherever they are in the value."""
    if isinstance(value, Tensor):
        if value.dim() == 0 or len(value) != rows:
            return value, value
        return value[: rows // 2], value[rows // 2 :]
    if isinstance(value, dict):
        pairs = {key: _cut(each, rows) for key, each in value.items()}
        first = {key: pair[0] for key, pair in pairs.items()}
        return first, {key: pair[1] for key, pair in pairs.items()}
    if type(value) in (list, tuple):
        cut = [_cut(each, rows) for each in value]
        return type(value)(pair[0] for pair in cut), type(value)(pair[1] for pair in cut)
    return value, value


def check_other(name: str, other: Any) -> Other:
    if isinstance(other, (nn.Module, str)):
        return other
    if isinstance(other, Mapping):
        for key, weight in other.items():
            check_number(f"{name}[{key!r}]", weight)
    elif not isinstance(other, Sequence) or not other:
        raise TypeError(
            f"{name} must be a model or adapters' names, got {other!r:.60} of type "
            f"{type(other).__name__}"
        )
    if not all(isinstance(key, str) for key in other):
        raise TypeError(f"{name} is {other!r:.60}; need adapters' names, which are strings")
    return other


def check_number(name: str, value: Any) -> float:
    number = real_number(name, value)
    if not math.isfinite(number):
        raise ValueError(f"{name} is {value}; need a finite number")
    return number
