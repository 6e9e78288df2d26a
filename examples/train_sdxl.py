"""Knows how an SDXL model is aligned on preference pairs, from the flags to the saved pipeline.

    accelerate launch examples/train_sdxl.py \\
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
        --dataset_name yuvalkirstain/pickapic_v2 --mixed_precision bf16 --gradient_checkpointing

All that is random about a pair (crop, flip, noise, timestep) is drawn from the seed, the epoch and
the pair's index, so a run does not depend on workers, batch layout, or having been interrupted.
(One exception: the fresh noise of --inversion_eta depends on the batch layout.)
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import fastpref
from checkpoints import (
    find_checkpoint,
    list_checkpoints,
    prune,
    remove_leftovers,
    step_of,
    written_aside,
)
from curves import append_metrics, plot_curves, read_metrics, truncate_metrics
from flags import check_resolution, parse_args
from objectives import Objective
from pair_data import PairStream, PreferencePairs, load_pairs
from sdxl import (
    DTYPES,
    Collator,
    draw_noise,
    encode_images,
    encode_prompts,
    frozen_copy,
    inverted_pairs,
    load_encoders,
    load_scheduler,
    noisy_pairs,
    side_factor,
)


def main(args: argparse.Namespace) -> None:
    """Train, and leave checkpoints, metrics, curves and a pipeline in `args.output_dir`."""
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / "logs")),
    )
    set_seed(args.seed)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output_dir)
    accelerator.wait_for_everyone()

    # The pipeline's parts. Only the UNet learns, in fp32; the rest is read-only.
    vae, tokenizers, text_encoders = load_encoders(args, accelerator.device)
    unet = UNet2DConditionModel.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="unet", torch_dtype=torch.float32,
        revision=args.revision, variant=args.variant, cache_dir=args.cache_dir,
    )  # fmt: skip
    scheduler = load_scheduler(args)
    check_resolution(args.resolution, side_factor(vae, unet))
    objective = Objective(args, scheduler.config.num_train_timesteps)
    # The base, whatever checkpoint is loaded below: never a half-trained model.
    reference = None
    if objective.needs_reference:
        reference = frozen_copy(unet, DTYPES[args.mixed_precision]).to(accelerator.device)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()

    # Data, and how long to train on it.
    extra_columns = [args.loser_caption_column, *(args.score_columns or ()), args.sign_column]
    with accelerator.main_process_first():
        rows = load_pairs(
            args.dataset_name, args.dataset_split_name, args.max_train_samples, args.cache_dir,
            [column for column in extra_columns if column is not None],
        )  # fmt: skip
    pairs = PreferencePairs(
        rows, args.resolution, args.seed, args.random_crop, args.random_flip,
        args.label_noise_prob, args.proportion_empty_prompts,
        args.loser_caption_column, args.score_columns, args.sign_column,
    )  # fmt: skip
    pairs_per_step = (
        args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    )
    if args.max_train_steps is not None:
        max_train_steps = args.max_train_steps
    elif args.num_train_epochs is not None:
        max_train_steps = math.ceil(args.num_train_epochs * len(pairs) / pairs_per_step)
    else:
        max_train_steps = 2000

    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=args.learning_rate * (pairs_per_step if args.scale_lr else 1),
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    # accelerate steps the schedule once per process.
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=max_train_steps * accelerator.num_processes,
    )
    unet, optimizer, lr_scheduler = accelerator.prepare(unet, optimizer, lr_scheduler)

    # Go on from a checkpoint: weights, optimizer, schedule, RNG, and the place in the data.
    step, pairs_seen = 0, 0
    checkpoint = find_checkpoint(args.resume_from_checkpoint, output_dir)
    if checkpoint is not None:
        accelerator.print(f"resuming from {checkpoint}")
        accelerator.load_state(str(checkpoint))
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        step, pairs_seen = state["step"], state["pairs_seen"]
    elif args.resume_from_checkpoint:
        accelerator.print(f"no checkpoint in {output_dir}: starting from scratch")
    later = [path.name for path in list_checkpoints(output_dir) if step_of(path) > step]
    if later:
        raise ValueError(
            f"--output_dir {output_dir} holds {', '.join(later)}, later than step {step} where "
            "this run begins; need --resume_from_checkpoint latest, or another folder"
        )
    loader = accelerator.prepare(
        DataLoader(
            pairs,
            batch_size=args.train_batch_size,
            sampler=PairStream(
                len(pairs), args.seed, pairs_seen,
                pairs_seen + (max_train_steps - step) * pairs_per_step,
            ),
            collate_fn=Collator(tokenizers),
            num_workers=args.dataloader_num_workers,
            generator=torch.Generator(),  # its own, so that the global RNG is left alone
        )
    )  # fmt: skip
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
    names: list[str] = []
    step_metrics: list[torch.Tensor] = []  # of the micro-batches of this step
    unread: list[torch.Tensor] = []  # of the steps not yet read from the device
    unread_lrs: list[float] = []

    def flush() -> None:
        """Average the unread steps over the processes, read them in one go, and log them."""
        if not unread:
            return
        means = accelerator.reduce(torch.stack(unread), reduction="mean").tolist()
        first = step - len(unread) + 1
        logged = [
            {"step": first + i, "lr": lr, **dict(zip(names, values, strict=True))}
            for i, (lr, values) in enumerate(zip(unread_lrs, means, strict=True))
        ]
        unread.clear()
        unread_lrs.clear()
        if accelerator.is_main_process:
            append_metrics(metrics_path, logged)
        for row in logged:
            accelerator.log({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))
        last = logged[-1]
        progress.set_postfix({k: f"{last[k]:.3g}" for k in ("loss", "margin", "accuracy")})

    def save_checkpoint() -> None:
        """Write everything a later run needs to go on from here as if nothing had happened."""
        target = output_dir / f"checkpoint-{step}"
        with written_aside(target, accelerator) as aside:
            accelerator.save_state(str(aside))
            if accelerator.is_main_process:
                state = {"step": step, "pairs_seen": pairs_seen}
                (aside / "trainer_state.json").write_text(json.dumps(state))
        if accelerator.is_main_process:
            prune(output_dir, args.checkpoints_total_limit, target)
            progress.write(f"step {step}: {fastpref.health(read_metrics(metrics_path))}")

    for batch in loader:
        with accelerator.accumulate(unet):
            with torch.no_grad():
                mean, std = encode_images(vae, batch["pixels"])
                noise, timesteps, vae_noise = draw_noise(
                    batch["seeds"], mean.shape[1:],
                    scheduler.config.num_train_timesteps, accelerator.device,
                )  # fmt: skip
                latents = mean + std * torch.cat([vae_noise, vae_noise])
                prompts, pooled = encode_prompts(text_encoders, batch["input_ids"])
                if args.loser_caption_column is None:  # the pair shares its caption
                    prompts, pooled = torch.cat([prompts, prompts]), torch.cat([pooled, pooled])
                condition = {
                    "encoder_hidden_states": prompts,
                    "added_cond_kwargs": {"text_embeds": pooled, "time_ids": batch["time_ids"]},
                }
                if args.inversion == "none":
                    noisy, target = noisy_pairs(latents, noise, timesteps, scheduler)
                else:
                    noisy, target = inverted_pairs(
                        args, unet, condition, latents, timesteps, scheduler, batch["seeds"]
                    )
                timesteps = torch.cat([timesteps, timesteps])
                ref_pred = None
                if reference is not None:
                    with accelerator.autocast():
                        ref_pred = reference(noisy, timesteps, **condition).sample

            model_pred = unet(noisy, timesteps, **condition).sample
            out = objective(model_pred, target, ref_pred, batch)

            accelerator.backward(out.loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(unet.parameters(), args.max_grad_norm)
            lr = lr_scheduler.get_last_lr()[0]
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()

        metrics = out.metrics()
        names = list(metrics)
        step_metrics.append(torch.stack([value.detach().float() for value in metrics.values()]))
        if not accelerator.sync_gradients:
            continue
        step += 1
        pairs_seen += pairs_per_step
        unread.append(torch.stack(step_metrics).mean(dim=0))
        unread_lrs.append(lr)
        step_metrics.clear()
        progress.update()
        at_checkpoint = step % args.checkpointing_steps == 0 or step == max_train_steps
        if step % args.log_every == 0 or at_checkpoint:
            flush()
        if at_checkpoint:
            save_checkpoint()
    progress.close()

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        plot_curves(metrics_path, output_dir / "curves.png", f"{args.loss}, {step} steps")
        save_pipeline(args, accelerator.unwrap_model(unet), vae, output_dir / "pipeline")
    accelerator.end_training()


def save_pipeline(
    args: argparse.Namespace, unet: UNet2DConditionModel, vae: AutoencoderKL, folder: Path
) -> None:
    """Save the pipeline it began from with the trained UNet, whole or not at all."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        args.pretrained_model_name_or_path, unet=unet, vae=vae.float(), add_watermarker=False,
        revision=args.revision, variant=args.variant, cache_dir=args.cache_dir,
    )  # fmt: skip
    if args.prediction_type:
        pipeline.scheduler.register_to_config(prediction_type=args.prediction_type)
    with written_aside(folder) as aside:
        pipeline.save_pretrained(aside)


if __name__ == "__main__":
    main(parse_args())
