"""The data of a run, from the flags to batches: read, looked through, out of a cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from trainer.args import TrainingArguments
from trainer.data.batches import Collator
from trainer.data.cache import build_cache
from trainer.data.groups import read_groups
from trainer.data.images import Size
from trainer.data.lists import check_shares
from trainer.data.pairs import PairBatches, PreferencePairs, StreamedPairs, images_of
from trainer.data.sources import has_splits, read_rows, settle_ties
from trainer.data.survey import survey
from trainer.data.tables import Source
from trainer.families.family import VAE_DTYPES, Encoders, Family
from trainer.losses import layout_of
from trainer.signals import leave_signals_to_parent

Rows: TypeAlias = Dataset | IterableDataset


def options(args: TrainingArguments, rows: Rows) -> dict[str, Any]:
    """What the flags say about making a pair, sample or list for training."""
    names = (
        "seed", "random_crop", "random_flip", "label_noise_prob", "proportion_empty_prompts",
        "loser_caption_column", "score_columns", "sign_column", "label_threshold",
    )  # fmt: skip
    making = {name: getattr(args, name) for name in names} | {"layout": layout_of(args.loss)}
    if making["layout"] != "pairs":
        making["members"] = len(images_of(rows.column_names))
        scores = [f"score_{i}" for i in range(making["members"])]
        making["score_columns"] = scores if scores[0] in rows.column_names else None
    return making


def all_rows(
    args: TrainingArguments, name: str, split: str, extra: Sequence[str | None] = (),
    streaming: bool = False,
) -> Rows:  # fmt: skip
    """The pairs of a data set, ties and all."""
    columns: dict[str, Any] = {
        "image_columns": args.image_columns, "label_column": args.label_column,
    }  # fmt: skip
    return read_rows(
        name, split, args.cache_dir,
        [column for column in (args.loser_caption_column, *extra) if column],
        # Those of samples and lists are not those of the held-out pairs beside them.
        **(columns if layout_of(args.loss) == "pairs" else {}),
        caption_column=args.caption_column, streaming=streaming,
    )  # fmt: skip


def train_rows(args: TrainingArguments, ties_too: bool = False) -> Rows:
    """The rows to train on."""
    layout = layout_of(args.loss)
    if layout != "pairs":
        groups = read_groups(layout, source_of(args))
        if args.loss == "rankdpo":
            check_shares(groups, args.loss)
        return groups.select(range(min(len(groups), args.max_train_samples or len(groups))))
    extra = [*(args.score_columns or ()), args.sign_column]
    rows = all_rows(args, args.dataset_name, args.dataset_split_name, extra, args.streaming)
    return rows if ties_too else settle_ties(rows, args.ties, args.seed, args.max_train_samples)


def source_of(args: TrainingArguments) -> Source:
    """The source of samples or lists that the flags name."""
    names = (
        "cache_dir", "image_columns", "label_column", "caption_column", "label_threshold",
        "list_size", "ties", "seed",
    )  # fmt: skip
    told = {name: getattr(args, name) for name in names}
    told |= {"name": args.dataset_name, "split": args.dataset_split_name}
    return Source(score_columns=args.score_columns or (), **told)


def heldout_rows(args: TrainingArguments) -> Rows | None:
    """The rows to score, if the flags name any."""
    if not args.eval_dataset_name and not args.eval_split_name:
        return None
    if not args.eval_dataset_name and not has_splits(args.dataset_name):
        raise ValueError(
            f"--eval_split_name is {args.eval_split_name}, but --dataset_name {args.dataset_name} "
            "has no splits; need --eval_dataset_name, with pairs that are not trained on"
        )
    name, split = args.eval_dataset_name or args.dataset_name, args.eval_split_name or "validation"
    return settle_ties(all_rows(args, name, split), args.ties, args.seed, args.max_eval_samples)


class Data(NamedTuple):
    """What a run is trained on (pairs, samples, lists, a stream of rows), and the pairs it is
    scored with."""

    train: PreferencePairs | IterableDataset
    heldout: PreferencePairs | None
    sizes: Sequence[Size]
    pairs: int  # to train on, or samples or lists; 0 for a stream, whose length nobody knows
    noises: int = 1  # of each pair or sample; of a list, one for each image


def load_data(
    args: TrainingArguments, family: Family, accelerator: Accelerator, sizes: Sequence[Size],
    rows: Rows, rows_heldout: Rows | None, encoders: Encoders,
) -> Data:  # fmt: skip
    """The rows as pairs, but for a stream."""
    train: Any = rows
    if not args.streaming:
        train = make_pairs(args, family, accelerator, rows, sizes, encoders, **options(args, rows))
    heldout = None
    if rows_heldout is not None:
        heldout = make_pairs(
            args, family, accelerator, rows_heldout, sizes, encoders, seed=args.seed,
            loser_caption_column=args.loser_caption_column,
        )  # fmt: skip
    noises = train.members if layout_of(args.loss) == "lists" else 1
    return Data(train, heldout, sizes, 0 if args.streaming else len(train), noises)


def make_pairs(
    args: TrainingArguments,
    family: Family,
    accelerator: Accelerator,
    rows: Dataset,
    sizes: Sequence[Size],
    encoders: Encoders,
    **making: Any,
) -> PreferencePairs:
    """The pairs of the rows whose images are whole, out of the latent cache if there is one."""
    rows, buckets = usable(args, accelerator, rows, sizes)
    cached = None
    if args.latent_cache:
        columns = ["caption", making.get("loser_caption_column")]
        cached = build_cache(
            family, Path(args.latent_cache), rows, buckets, sizes, encoders, accelerator,
            random_flip=making.get("random_flip", False), batch_size=2 * args.train_batch_size,
            dtype=VAE_DTYPES[args.latent_cache_dtype],
            caption_columns=[column for column in columns if column],
            captions=not args.train_text_encoder, num_workers=args.dataloader_num_workers,
        )  # fmt: skip
    return PreferencePairs(rows, sizes, buckets, cached=cached, **making)


def make_loader(
    args: TrainingArguments,
    accelerator: Accelerator,
    data: Data,
    collate: Collator,
    pairs_seen: int,
    count: int,
) -> DataLoader[Any]:
    """This process's batches after the pairs that all together have seen: `count`, or of a stream
    without end."""
    processes, process = accelerator.num_processes, accelerator.process_index
    loading: dict[str, Any] = {
        "collate_fn": collate,
        "num_workers": args.dataloader_num_workers,
        "pin_memory": accelerator.device.type == "cuda",
        "generator": torch.Generator(),  # its own, so that the global RNG is left alone
        "worker_init_fn": leave_signals_to_parent,
    }
    if isinstance(data.train, PreferencePairs):
        assert data.train.buckets is not None
        batches = PairBatches(
            data.train.buckets, args.train_batch_size, args.seed, pairs_seen, count * processes
        )
        ours = BatchSamplerShard(batches, processes, process)
        return DataLoader(data.train, batch_sampler=ours, **loading)
    stream = StreamedPairs(
        data.train, data.sizes[0], rank=process, world=processes, start=pairs_seen,
        batch_size=args.train_batch_size, **options(args, data.train),
    )  # fmt: skip
    return DataLoader(stream, batch_size=args.train_batch_size, **loading)


def usable(
    args: TrainingArguments, accelerator: Accelerator, rows: Dataset, sizes: Sequence[Size]
) -> tuple[Dataset, NDArray[np.int64]]:
    """The rows whose images are whole, and their buckets. One process looks, for all."""
    seen: list[Any] = [None, None]
    if accelerator.is_main_process:
        found = survey(
            rows, sizes, workers=args.dataloader_num_workers, max_refused=args.max_refused
        )
        tell_refused(args, [f"{image.where}: {image.reason}" for image in found.refused])
        seen = [{image.row for image in found.refused}, found.buckets]
    refused, buckets = broadcast_object_list(seen)
    if refused:
        rows = rows.select([row for row in range(len(rows)) if row not in refused])
    return rows, buckets


def tell_refused(args: TrainingArguments, lines: Sequence[str], anew: bool = False) -> None:
    """Say which images are left out: on the screen how many, in refused.txt which and why."""
    path = Path(args.output_dir) / "refused.txt"
    if anew:
        path.unlink(missing_ok=True)
    known = set(path.read_text().splitlines()) if lines and path.exists() else set()
    new = [line for line in dict.fromkeys(lines) if line not in known]
    if new:
        tqdm.write(f"{len(new)} images refused, such as {new[0]}; all are in {path}")
        with path.open("a") as file:
            file.writelines(f"{line}\n" for line in new)
