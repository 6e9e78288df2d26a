"""Alignment of an SDXL model on preference pairs, from the flags to the saved pipeline.

    accelerate launch examples/train_sdxl.py \\
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
        --dataset_name yuvalkirstain/pickapic_v2 --mixed_precision bf16 --gradient_checkpointing

All that is random about a pair (crop, flip, noise, timestep) is drawn from the seed, the epoch and
the pair's index, so a run does not depend on workers, batch layout, or having been interrupted.
(Two exceptions: --inversion_eta draws by batch, and --aspect_buckets fills batches by size.)
"""

from __future__ import annotations

import startup  # noqa: F401 - before torch

# isort: split
import copy
import functools
import itertools
import json
import math
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    InitProcessGroupKwargs,
    ProjectConfiguration,
    send_to_device,
    set_seed,
)
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm

import fastpref
from check_data import check_data
from checkpoints import (
    STATE_FILE,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune,
    remove_leftovers,
    step_of,
    written_aside,
)
from curves import plot_curves, read_metrics, truncate_metrics
from flags import TrainingArguments, parse_args, save_args
from heldout import HeldOut
from journal import Journal
from latent_cache import release
from model_card import push, write_card
from objectives import Objective
from painting import Painter
from pair_data import bucket_sizes
from policy import (
    EMA,
    add_lora,
    averaged,
    check_sharding,
    clip_or_skip,
    keep_only_what_learns,
    make_optimizer,
    poison,
    save_trained,
    trainable,
    without_adapters,
)
from run_data import (
    heldout_rows,
    make_loader,
    make_pairs,
    options,
    tell_refused,
    train_rows,
)
from sdxl import (
    DTYPES,
    Collator,
    Draws,
    condition_of,
    frozen_copy,
    inverted_pairs,
    latents_of,
    load_encoders,
    load_scheduler,
    load_unet,
    load_vae,
    min_snr_weight,
    noisy_pairs,
    side_factor,
)
from stopping import Stop
from trainer.checks import check_resolutions
from trainer.entry import one_line_errors
from watching import Watch


def main(args: TrainingArguments) -> None:
    """Train, and leave checkpoints, metrics, curves and the result in `args.output_dir`."""
    with Stop(Path(args.output_dir)) as stop:
        train(args, stop)


def train(args: TrainingArguments, stop: Stop) -> None:
    """The run itself, which `stop` may end before its last step."""
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        # One process looks through the data and paints while the others wait: by default, minutes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / "logs")),
    )
    args.mixed_precision = accelerator.mixed_precision
    check_sharding(args, accelerator)
    set_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output_dir)
        save_args(args, output_dir)
    accelerator.wait_for_everyone()

    # Data.
    scheduler = load_scheduler(args)
    scheduler_on_host = copy.deepcopy(scheduler)  # the other one follows the latents
    factor = side_factor(args)
    check_resolutions(args.resolution, factor)
    sizes = bucket_sizes(args.resolution, factor, args.aspect_buckets)
    if args.check_data:
        rows = train_rows(args, ties_too=True)
        workers = args.dataloader_num_workers
        if accelerator.is_main_process:
            print(check_data(rows, sizes, output_dir, ties=args.ties, workers=workers,
                             max_samples=args.max_train_samples,
                             max_refused=args.max_refused, **options(args)))  # fmt: skip
        return
    if accelerator.is_main_process:
        tell_refused(args, [], anew=True)
    with accelerator.main_process_first():
        rows, rows_heldout = train_rows(args), heldout_rows(args)

    # What pairs are made of: once, where there is a cache, or at each step by frozen encoders.
    encoders = load_encoders(args, accelerator.device)
    vae, tokenizers, text_encoders = encoders
    draws = Draws(
        vae.config.latent_channels,
        2 ** (len(vae.config.block_out_channels) - 1),
        scheduler.config.num_train_timesteps,
    )
    pairs = heldout = painter = None
    if not args.streaming:
        pairs = make_pairs(args, accelerator, rows, sizes, encoders, **options(args))
    if rows_heldout is not None:
        pairs_heldout = make_pairs(
            args, accelerator, rows_heldout, sizes, encoders, seed=args.seed,
            loser_caption_column=args.loser_caption_column,
        )  # fmt: skip
        heldout = HeldOut(
            pairs_heldout, encoders, scheduler, accelerator, args.train_batch_size, seed=args.seed
        )
        tell_refused(args, heldout.refused)
    if args.validation_prompts:
        painter = Painter(
            args.validation_prompts, encoders, accelerator.device,
            args.resolution[0], args.resolution[0], args.validation_inference_steps,
            args.validation_guidance_scale, args.seed,
            functools.partial(load_vae, args), accelerator.autocast,
        )  # fmt: skip
    if args.latent_cache:
        release(vae, *([] if args.train_text_encoder else text_encoders))

    # The model. The UNet learns, in fp32, or adapters do; what is frozen is kept in less.
    unet = load_unet(args)
    objective = Objective(args, scheduler.config.num_train_timesteps)
    frozen = None
    if args.lora_rank:
        unet.to(accelerator.device, DTYPES[args.mixed_precision])
        add_lora(args, unet, text_encoders if args.train_text_encoder else [])
    elif objective.needs_reference:
        # The base, whatever checkpoint is loaded below: never a half-trained model.
        frozen = frozen_copy(unet, DTYPES[args.mixed_precision]).to(accelerator.device)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.torch_compile:
        # Widths, training and not, adapters on and off: more variants than it allows by default.
        torch._dynamo.config.cache_size_limit = 64
        unet.compile_repeated_blocks()
    unet.train()

    # How long to train.
    count = 0 if pairs is None else len(pairs)  # nobody knows how long a stream is
    pairs_per_step = (
        args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    )
    if args.max_train_steps is not None:
        max_train_steps = args.max_train_steps
    elif args.num_train_epochs is not None:
        max_train_steps = math.ceil(args.num_train_epochs * count / pairs_per_step)
    else:
        max_train_steps = 2000

    learning = [unet, *(text_encoders if args.train_text_encoder else [])]
    parameters = trainable(learning)
    learning_rate = args.learning_rate * (pairs_per_step if args.scale_lr else 1)
    optimizer = make_optimizer(args, parameters, learning_rate)
    # accelerate steps the schedule once per process.
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=max_train_steps * accelerator.num_processes,
    )
    *learning, optimizer, lr_scheduler = accelerator.prepare(*learning, optimizer, lr_scheduler)
    unet, base_unet = learning[0], accelerator.unwrap_model(learning[0])
    if args.train_text_encoder:
        text_encoders = learning[1:]
    parameters = trainable(learning)  # sharding makes others of them
    ema = None
    if args.use_ema:
        ema = EMA(parameters, decay=args.ema_decay)
    keep_only_what_learns(accelerator, ema)

    # Go on from a checkpoint: weights, optimizer, schedule, RNG, and the place in the data.
    state = {
        "step": 0, "pairs_seen": 0, "bad_in_row": 0, "pairs": count, "loss": args.loss,
        "look_cut_short": False,
    }  # fmt: skip
    checkpoint = find_checkpoint(args.resume_from_checkpoint, output_dir)
    if checkpoint is not None:
        accelerator.print(f"resuming from {checkpoint}")
        state |= load_checkpoint(accelerator, checkpoint)
        if state["pairs"] != count:
            raise ValueError(
                f"{checkpoint} is of a run on {state['pairs']} pairs; there are {count} now: need "
                "the same data, to go on in their order"
            )
        if state["loss"] != args.loss:
            raise ValueError(
                f"{checkpoint} is of a run with --loss {state['loss']}; --loss is {args.loss} now: "
                "need the same, or another --output_dir"
            )
    elif args.resume_from_checkpoint:
        accelerator.print(f"no checkpoint in {output_dir}: starting from scratch")
    step = state["step"]
    if step > max_train_steps:
        raise ValueError(
            f"--max_train_steps is {max_train_steps}, and {checkpoint} is at step {step}; need at "
            "least as many"
        )
    later = [path.name for path in list_checkpoints(output_dir) if step_of(path) > step]
    if later:
        raise ValueError(
            f"--output_dir {output_dir} holds {', '.join(later)}, later than step {step} where "
            "this run begins; need --resume_from_checkpoint latest, or another folder"
        )
    micro_batches = (max_train_steps - step) * args.gradient_accumulation_steps
    loader = make_loader(
        args, accelerator, rows if pairs is None else pairs, sizes, Collator(tokenizers, draws),
        state["pairs_seen"], micro_batches,
    )  # fmt: skip

    def now() -> AbstractContextManager[Any]:
        return averaged(ema, parameters, unet)

    def base() -> AbstractContextManager[Any]:
        """The model before training, also where training goes on."""
        if args.lora_rank:
            return without_adapters(*learning)
        if frozen is not None or step == 0:
            return nullcontext(unet if frozen is None else frozen)
        model = frozen_copy(load_unet(args), DTYPES[args.mixed_precision])
        return nullcontext(model.to(accelerator.device))

    watch = Watch(args, accelerator, stop, heldout, painter, scheduler, now, base,
                  text_encoders if args.train_text_encoder else [])  # fmt: skip
    metrics_path = output_dir / "metrics.jsonl"
    if accelerator.is_main_process:
        truncate_metrics(metrics_path, step)
        if args.report_to != "none":
            settings = {
                key: str(value) if isinstance(value, list) else value  # tensorboard takes no list
                for key, value in vars(args).items()
                if value is not None
            }
            accelerator.init_trackers("fastpref", settings)

    progress = tqdm(total=max_train_steps, initial=step, disable=not accelerator.is_main_process,
                    desc=args.loss, unit="step")  # fmt: skip
    journal = Journal(accelerator, metrics_path, progress, step, state["bad_in_row"])

    def too_bad() -> bool:
        return journal.longest >= args.max_bad_steps

    def save_checkpoint() -> None:
        """Write everything a later run needs to go on from here as if nothing had happened."""
        journal.flush()
        target = output_dir / f"checkpoint-{journal.step}"
        with written_aside(target, accelerator) as aside:
            accelerator.save_state(str(aside))
            if accelerator.is_main_process:
                seen = state["pairs_seen"] + (journal.step - step) * pairs_per_step
                place = {
                    "step": journal.step,
                    "pairs_seen": seen,
                    "bad_in_row": 0 if too_bad() else journal.bad_in_row,
                    "look_cut_short": watch.cut_short,
                    "processes": accelerator.num_processes,
                }
                (aside / STATE_FILE).write_text(json.dumps(state | place))
        if accelerator.is_main_process:
            prune(output_dir, args.checkpoints_total_limit, target)
            health = fastpref.health(read_metrics(metrics_path))
            progress.write(f"step {journal.step}: {health}")

    watch.begin(step, again=state["look_cut_short"], last=step == max_train_steps)
    stop.begin_steps(accelerator)
    for batch in itertools.islice(loader, micro_batches):  # a stream has no end
        tell_refused(args, batch["refused"])
        on_host = batch["timesteps"]
        batch = send_to_device(batch, accelerator.device, non_blocking=True)
        with accelerator.accumulate(*learning):
            timesteps = torch.cat([batch["timesteps"], batch["timesteps"]])
            with torch.set_grad_enabled(args.train_text_encoder):
                condition = condition_of(batch, text_encoders)
            with torch.no_grad():
                latents = latents_of(batch, vae)
                if args.inversion == "none":
                    noisy, target = noisy_pairs(
                        latents, batch["noise"], batch["timesteps"], scheduler
                    )
                else:
                    noisy, target = inverted_pairs(
                        args, unet, condition, latents, on_host, scheduler_on_host,
                        batch["seeds"],
                    )  # fmt: skip
                ref_pred = None
                if frozen is not None:
                    with accelerator.autocast():
                        ref_pred = frozen(noisy, timesteps, **condition).sample
                elif objective.needs_reference:
                    with without_adapters(*learning), accelerator.autocast():
                        unchanged = condition
                        if args.train_text_encoder:
                            unchanged = condition_of(batch, text_encoders)
                        ref_pred = base_unet(noisy, timesteps, **unchanged).sample
                if args.snr_gamma:
                    batch["sample_weight"] = min_snr_weight(
                        scheduler, batch["timesteps"], args.snr_gamma
                    )

            model_pred = unet(noisy, timesteps, **condition).sample
            out = objective(model_pred, target, ref_pred, batch)

            accelerator.backward(out.loss * poison(out.loss))
            if accelerator.sync_gradients:
                grad_norm, skipped = clip_or_skip(
                    accelerator, optimizer, parameters, args.max_grad_norm
                )
            lr = lr_scheduler.get_last_lr()[0]
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()

        journal.note(out.metrics())
        if not accelerator.sync_gradients:
            continue
        if ema is not None:
            ema.step(parameters)
        journal.end_step(lr, grad_norm, skipped)
        at_end = journal.step == max_train_steps
        at_checkpoint = at_end or journal.step % args.checkpointing_steps == 0
        at_look = watch.is_due(journal.step, last=at_end)
        if at_checkpoint or at_look or journal.step % args.log_every == 0:
            journal.flush()
        if at_look:
            watch.look(journal.step, last=at_end)
        if not (at_checkpoint or too_bad() or stop.agreed()):
            continue
        save_checkpoint()
        if too_bad():
            raise FloatingPointError(
                f"loss or gradients were not finite for {journal.longest} steps in a row, as was "
                f"seen at step {journal.step}; none of them changed the weights, which checkpoint-"
                f"{journal.step} holds. Lower --learning_rate or beta, or use bf16 or fp32; "
                "--max_bad_steps says when to stop"
            )
        if stop.agreed():
            progress.close()
            stop.leave(journal.step)
    stop.end_steps()
    progress.close()

    accelerator.wait_for_everyone()
    with averaged(ema, parameters, unet):
        result, files = save_trained(args, accelerator, learning, output_dir)
    accelerator.wait_for_everyone()  # gloo may abort a process that leaves right behind a gather
    if accelerator.is_main_process:
        curves = output_dir / "curves.png"
        title = f"{args.loss}, {journal.step} steps"
        plot_curves(metrics_path, curves, title, watch.rows_path)
        files += write_card(
            result, base_model=args.pretrained_model_name_or_path, dataset=args.dataset_name,
            loss=args.loss, settings=vars(args), metrics_path=metrics_path,
            lora=bool(args.lora_rank), pictures=[curves, *watch.last_grid(journal.step)],
            heldout_path=watch.rows_path, repo_id=args.hub_model_id,
        )  # fmt: skip
        print(f"step {journal.step}: the result is in {result}, the curves in {curves}")
        if args.push_to_hub and args.hub_model_id:
            url = push(result, files, args.hub_model_id, private=args.hub_private_repo)
            print(f"pushed to {url}")
    accelerator.end_training()


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
