"""The training run, from the flags to the saved result: `train` is the algorithm.

All that is random about a pair, sample or list (crop, flip, noise, timestep) is drawn from the
seed, the epoch and its index, so a run does not depend on workers, batch layout, or having been
interrupted.
(Two exceptions: --inversion_eta draws by batch, and --aspect_buckets fills batches by size.)
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, set_seed
from tqdm.auto import tqdm

from trainer.args import TrainingArguments, save_args
from trainer.card import push, write_card
from trainer.checkpoints import Checkpoints, keep_only_what_learns
from trainer.checks import check_resolutions
from trainer.data.batches import Collator, Draws
from trainer.data.buckets import bucket_sizes
from trainer.data.cache import release
from trainer.data.check import check_data
from trainer.data.images import Size
from trainer.data.loader import (
    Data,
    Rows,
    heldout_rows,
    load_data,
    make_loader,
    options,
    tell_refused,
    train_rows,
)
from trainer.evaluate import HeldOut
from trainer.export import save_trained
from trainer.families.family import DTYPES, Encoders, Family
from trainer.families.loading import (
    check_base,
    frozen_copy,
    load_denoiser,
    load_encoders,
    load_scheduler,
    load_vae,
    side_factor,
)
from trainer.files import make_folder, remove_leftovers
from trainer.lora import add_lora, without_adapters
from trainer.metrics import MetricsLog, truncate_metrics
from trainer.monitor import Monitor
from trainer.objective import Objective
from trainer.optim import Learner, check_sharding, make_learner
from trainer.plots import plot_curves
from trainer.sampling import PromptSampler
from trainer.signals import Stop
from trainer.step import Models, training_step
from trainer.unpacked import unpack


def main(args: TrainingArguments, family: Family) -> None:
    """Train, and leave checkpoints, metrics, curves and the result in `args.output_dir`."""
    with Stop(Path(args.output_dir)) as stop:
        train(args, family, stop)


def train(args: TrainingArguments, family: Family, stop: Stop) -> None:
    """The run itself, which `stop` may end before its last step."""
    accelerator = start(args, family)
    given = args
    with accelerator.main_process_first():
        args = unpack(given, family)
    check_base(args, family)
    scheduler = load_scheduler(args, family)
    objective = Objective(args, family, scheduler)
    sizes = sizes_of(args, family)
    if args.check_data:
        report_data(args, accelerator, sizes)
        return

    # Data, and what evaluates the model on the way.
    rows, rows_heldout = read_data(args, accelerator)
    encoders = load_encoders(args, family, accelerator.device)
    data = load_data(args, family, accelerator, sizes, rows, rows_heldout, encoders)
    heldout = hold_out(args, family, accelerator, data, encoders)
    sampler = prompt_sampler(args, family, accelerator, encoders)
    draws = draws_of(family, scheduler, encoders, data.noises)
    collate = Collator(family, encoders.tokenizers, draws)

    # The model: it learns in fp32, or adapters do; what is frozen is kept in less.
    pairs_per_step = (
        args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    )
    max_train_steps = steps_of(args, data.pairs, pairs_per_step)
    learning_rate = args.learning_rate * (pairs_per_step if args.scale_lr else 1)
    models, learning = load_models(args, family, accelerator, objective, scheduler, encoders)
    learner = make_learner(args, accelerator, learning, max_train_steps, learning_rate)
    models = models_of(family, models, learner)
    keep_only_what_learns(accelerator, learner.ema)

    # Go on from a checkpoint: weights, optimizer, schedule, random states, and place in the data.
    checkpoints = Checkpoints(args, accelerator, data.pairs, pairs_per_step)
    place = checkpoints.resume(max_train_steps)
    micro_batches = (max_train_steps - place["step"]) * args.gradient_accumulation_steps
    loader = make_loader(args, accelerator, data, collate, place["pairs_seen"], micro_batches)
    log = start_log(given, accelerator, place, max_train_steps)
    monitor = Monitor(
        args, accelerator, stop, heldout, sampler,
        now=functools.partial(as_averaged, models, learner),
        base=functools.partial(as_before, args, family, models, learner, place["step"] == 0),
    )  # fmt: skip
    monitor.begin(place["step"], place["look_cut_short"], last=place["step"] == max_train_steps)

    stop.begin_steps(accelerator)
    for batch in itertools.islice(loader, micro_batches):  # a stream has no end
        tell_refused(args, batch["refused"])
        with accelerator.accumulate(*learner.models.values()):
            out = training_step(family, models, objective, batch)
            lr, grad_norm, skipped = learner.step(out.loss)
        log.note(objective.metrics(out, batch))
        if not accelerator.sync_gradients:
            continue
        log.end_step(lr, grad_norm, skipped)
        at_end = log.step == max_train_steps
        at_checkpoint = at_end or log.step % args.checkpointing_steps == 0
        at_look = monitor.is_due(log.step, last=at_end)
        if at_checkpoint or at_look or log.step % args.log_every == 0:
            log.flush()
        if at_look:
            monitor.look(log.step, last=at_end)
        if at_checkpoint or log.too_bad or stop.agreed():
            log.flush()
            checkpoints.save(log.step, log.bad_to_keep, monitor.cut_short)
            log.say_health()
            log.raise_if_too_bad(hint_of(args))
        if stop.agreed():
            log.progress.close()
            stop.leave(log.step)
    stop.end_steps()
    log.progress.close()
    finish(given, args, family, accelerator, learner, log, monitor)


def start(args: TrainingArguments, family: Family) -> Accelerator:
    """The processes, the seed, and an output folder without what a killed run left half-written."""
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        # One process looks through the data and samples while others wait: by default, minutes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / "logs")),
    )
    args.mixed_precision = accelerator.mixed_precision
    check_sharding(args, family, accelerator)
    set_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    if accelerator.is_main_process:
        make_folder("--output_dir", output_dir)
        remove_leftovers(output_dir)
    accelerator.wait_for_everyone()
    return accelerator


def sizes_of(args: TrainingArguments, family: Family) -> list[Size]:
    """The sizes that images are trained at."""
    factor = side_factor(args, family)
    check_resolutions(args.resolution, factor)
    return bucket_sizes(args.resolution, factor, args.aspect_buckets)


def report_data(args: TrainingArguments, accelerator: Accelerator, sizes: list[Size]) -> None:
    """Print what --check_data asks for."""
    rows = train_rows(args, ties_too=True)
    if accelerator.is_main_process:
        report = check_data(
            rows, sizes, Path(args.output_dir), ties=args.ties,
            workers=args.dataloader_num_workers, max_samples=args.max_train_samples,
            max_refused=args.max_refused, **options(args, rows),
        )  # fmt: skip
        print(report)


def read_data(args: TrainingArguments, accelerator: Accelerator) -> tuple[Rows, Rows | None]:
    """The rows to train on, and those to score."""
    if accelerator.is_main_process:
        tell_refused(args, [], anew=True)
    with accelerator.main_process_first():
        return train_rows(args), heldout_rows(args)


def draws_of(family: Family, scheduler: Any, encoders: Encoders, noises: int = 1) -> Draws:
    config = encoders.vae.config
    factor = 2 ** (len(config.block_out_channels) - 1)
    return Draws(family, scheduler, config.latent_channels, factor, noises)


def hold_out(
    args: TrainingArguments, family: Family, accelerator: Accelerator, data: Data,
    encoders: Encoders,
) -> HeldOut | None:  # fmt: skip
    """The held-out pairs, encoded, if there are some."""
    if data.heldout is None:
        return None
    heldout = HeldOut(
        family, data.heldout, encoders, accelerator, args.train_batch_size, seed=args.seed
    )
    tell_refused(args, heldout.refused)
    return heldout


def prompt_sampler(
    args: TrainingArguments, family: Family, accelerator: Accelerator, encoders: Encoders
) -> PromptSampler | None:
    """What samples --validation_prompts, if there are some."""
    if not args.validation_prompts:
        return None
    return PromptSampler(
        family, args.validation_prompts, encoders, accelerator.device, args.resolution[0],
        args.resolution[0], args.validation_inference_steps, args.validation_guidance_scale,
        args.seed, functools.partial(load_vae, args), accelerator.autocast,
    )  # fmt: skip


def steps_of(args: TrainingArguments, pairs: int, pairs_per_step: int) -> int:
    """How many optimizer steps the flags ask for."""
    if args.max_train_steps is not None:
        return int(args.max_train_steps)
    if args.num_train_epochs is not None:
        return math.ceil(args.num_train_epochs * pairs / pairs_per_step)
    return 2000


def load_models(
    args: TrainingArguments, family: Family, accelerator: Accelerator, objective: Objective,
    scheduler: Any, encoders: Encoders,
) -> tuple[Models, dict[str, Any]]:  # fmt: skip
    """All models that a batch passes, and those of them that learn, by the pipeline's names."""
    learns_text, dtype = args.train_text_encoder, DTYPES[args.mixed_precision]
    if args.latent_cache:
        release(encoders.vae, *([] if learns_text else encoders.text_encoders))
    denoiser = load_denoiser(args, family)
    frozen, learning = None, {family.denoiser: denoiser}
    if args.lora_rank:
        denoiser.to(accelerator.device, dtype)
        texts = encoders.text_encoders if learns_text else []
        adapted = add_lora(args, family, denoiser, texts)
        learning |= {
            part.encoder: encoder
            for part, encoder in zip(family.texts, encoders.text_encoders, strict=True)
            if encoder in adapted
        }
    elif objective.needs_reference:
        # The base, whatever checkpoint is loaded later: never a half-trained model.
        frozen = frozen_copy(denoiser, dtype).to(accelerator.device)
    if args.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    if args.torch_compile:
        # Widths, training and not, adapters on and off: more variants than it allows by default.
        torch._dynamo.config.cache_size_limit = 64
        if not denoiser._repeated_blocks:  # as of SD3's transformer
            denoiser._repeated_blocks = family.blocks
        denoiser.compile_repeated_blocks()
    denoiser.train()
    models = Models(denoiser, encoders, scheduler, frozen, learns_text, accelerator.autocast)
    return models, learning


def models_of(family: Family, models: Models, learner: Learner) -> Models:
    """The models with those that learn as accelerate has prepared them."""
    encoders = models.encoders
    texts = [
        learner.models.get(part.encoder, encoder)
        for part, encoder in zip(family.texts, encoders.text_encoders, strict=True)
    ]
    return models._replace(
        denoiser=learner.models[family.denoiser], encoders=encoders._replace(text_encoders=texts)
    )


def hint_of(args: TrainingArguments) -> str:
    """What may be the cause of steps that are not finite, beside the learning rate."""
    if args.vae_dtype == "fp16" and not args.latent_cache:
        return "The VAE may overflow in fp16, as SDXL's own does: try --vae_dtype bf16 or fp32. "
    return ""


@contextmanager
def as_averaged(models: Models, learner: Learner) -> Iterator[Models]:
    """The models as they are, with the moving average where one is kept."""
    with learner.averaged():
        yield models


@contextmanager
def as_before(
    args: TrainingArguments, family: Family, models: Models, learner: Learner, fresh: bool
) -> Iterator[Models]:
    """The models before training, also where training goes on."""
    if args.lora_rank:
        with without_adapters(*learner.models.values()):
            yield models
    elif models.frozen is not None:
        yield models._replace(denoiser=models.frozen)
    elif fresh:
        yield models
    else:
        base = frozen_copy(load_denoiser(args, family), DTYPES[args.mixed_precision])
        yield models._replace(denoiser=base.to(learner.accelerator.device))


def start_log(
    args: TrainingArguments, accelerator: Accelerator, place: dict[str, Any], steps: int
) -> MetricsLog:
    """The log of metrics, from the place that the run goes on from."""
    path = Path(args.output_dir) / "metrics.jsonl"
    if accelerator.is_main_process:
        save_args(args, path.parent)
        truncate_metrics(path, place["step"])
        if args.report_to != "none":
            settings = {
                key: str(value) if isinstance(value, list) else value  # tensorboard takes no list
                for key, value in vars(args).items()
                if value is not None
            }
            accelerator.init_trackers("fastpref", settings)
    progress = tqdm(
        total=steps, initial=place["step"], disable=not accelerator.is_main_process,
        desc=args.loss, unit="step",
    )  # fmt: skip
    return MetricsLog(
        accelerator, path, progress, place["step"], place["bad_in_row"], args.max_bad_steps
    )


def finish(
    given: TrainingArguments,
    args: TrainingArguments, family: Family, accelerator: Accelerator, learner: Learner,
    log: MetricsLog, monitor: Monitor,
) -> None:  # fmt: skip
    """Write the result, its curves and its card, and upload them if asked to.

    `given` are the flags as they came, with a base in one file for example.
    """
    output_dir = Path(args.output_dir)
    accelerator.wait_for_everyone()
    with learner.averaged():
        result, files = save_trained(args, family, accelerator, learner.models, output_dir)
    accelerator.wait_for_everyone()  # gloo may abort a process that leaves right behind a gather
    if accelerator.is_main_process:
        curves = output_dir / "curves.png"
        title = f"{args.loss}, {log.step} steps"
        plot_curves(log.path, curves, title, monitor.rows_path)
        files += write_card(
            result, family, base_model=given.pretrained_model_name_or_path,
            dataset=args.dataset_name, loss=args.loss, settings=vars(given), metrics_path=log.path,
            lora=bool(args.lora_rank), pictures=[curves, *monitor.last_grid(log.step)],
            heldout_path=monitor.rows_path, repo_id=args.hub_model_id,
        )  # fmt: skip
        print(f"step {log.step}: the result is in {result}, the curves in {curves}")
        if args.push_to_hub and args.hub_model_id:
            url = push(result, files, args.hub_model_id, private=args.hub_private_repo)
            print(f"pushed to {url}")
    accelerator.end_training()
