"""What trackers get of a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from small_run import Train, seeing
from trainer.monitor import log_pictures


def test_tensorboard_gets_scores_metrics_and_pictures(train: Train, world: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(report_to="tensorboard", max_train_steps=4, **seeing(world))
    events = EventAccumulator(str(folder / "logs" / "fastpref"), {"images": 0}).Reload()
    assert {"loss", "eval/accuracy"} <= {*events.Tags()["scalars"]}
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert events.Tags()["images"] == ["validation"]
    shown = events.Images("validation")
    assert [image.step for image in shown] == [0, 2, 4]
    assert (shown[0].width, shown[0].height) == (32, 16)  # a picture of each prompt


def test_other_trackers_get_pictures_if_they_take_some() -> None:
    given: list[Any] = []
    gallery = SimpleNamespace(name="wandb", log_images=lambda *args: given.append(args))
    plain = SimpleNamespace(name="plain")
    accelerator: Any = SimpleNamespace(trackers=[plain, gallery])
    pictures = [Image.fromarray(np.zeros((4, 4, 3), np.uint8))] * 2
    log_pictures(accelerator, pictures, 7)
    assert given == [({"validation": pictures}, 7)]
