"""The end of a run on SIGTERM or Ctrl-C: all processes stop after the same step, with a checkpoint.

A signal can come at any moment and to any process. While steps are made it is only taken note of;
at the end of the step the processes agree. Before the first step and after the last one there is
nothing to lose, and a process ends at once, even where it waits in a collective or a long kernel.
That is why a thread of its own hears the signals: Python's handlers run between two instructions
of the main thread.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from accelerate import Accelerator
from torch import distributed

from trainer.checkpoints import list_checkpoints

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """The signals that came, and what the processes make of them. It listens inside its `with`."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.heard = 0  # the number of the first signal that came to this process
        self.agreement = 0  # the number of the signal that all processes stop for
        self.stepping = False  # while steps are made, a signal waits for the end of one
        self.group: distributed.ProcessGroup | None = None  # where there are several processes
        self.accelerator: Accelerator | None = None
        self.lock = threading.Lock()

    def __enter__(self) -> Stop:
        self.ear, self.mouth = socket.socketpair()
        self.mouth.setblocking(False)
        threading.Thread(target=self.listen, daemon=True).start()
        self.before = [signal.signal(signum, do_nothing) or signal.SIG_DFL for signum in SIGNALS]
        self.wakeup_before = signal.set_wakeup_fd(self.mouth.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *error: object) -> None:
        signal.set_wakeup_fd(self.wakeup_before)
        for signum, handler in zip(SIGNALS, self.before, strict=True):
            signal.signal(signum, handler)
        self.mouth.close()  # which ends the thread

    def listen(self) -> None:
        """Hear signals, in a thread of its own, until the other end is closed."""
        with self.ear:
            while heard := self.ear.recv(1):
                if heard[0] in SIGNALS:
                    self.hear(heard[0])

    def hear(self, signum: int) -> None:
        with self.lock:
            again = self.heard != 0
            self.heard = self.heard or signum
            wait = self.stepping and not (again and signum == signal.SIGINT)
        if not wait:
            self.leave_now()
        if not again:
            tell(f"{name_of(signum)}: stopping after this step, with a checkpoint "
                 "(Ctrl-C: at once, without)")  # fmt: skip

    def begin_steps(self, accelerator: Accelerator) -> None:
        """From now on signals wait for the end of a step. All processes call this together."""
        self.accelerator = accelerator
        if accelerator.num_processes > 1:
            # Processes agree on the CPU: to ask the device would make Python wait for it. The
            # timeout is the one of the other groups.
            self.group = distributed.new_group(backend="gloo", timeout=timedelta(days=1))
        with self.lock:
            self.stepping = True

    def end_steps(self) -> None:
        """From now on signals stop the process at once; one that has come does it here."""
        with self.lock:
            self.stepping = False
        if self.asked():
            self.leave_now()

    def asked(self) -> bool:
        """Whether this process knows of a signal."""
        return bool(self.agreement or self.heard)

    def agreed(self) -> bool:
        """Whether any process has heard a signal. All processes call this together."""
        if self.group is None:
            self.agreement = self.heard
        elif not self.agreement:
            heard = torch.tensor(self.heard)
            distributed.all_reduce(heard, distributed.ReduceOp.MAX, self.group)
            self.agreement = int(heard)
        return self.agreement != 0

    def leave(self, step: int) -> NoReturn:
        """End the run after `step`, whose checkpoint is whole. All processes call this together."""
        assert self.accelerator is not None
        for tracker in self.accelerator.trackers:
            tracker.finish()
        tell(f"stopped by {name_of(self.agreement)} after step {step}; {self.how_to_go_on()}")
        if self.group is not None:
            exit_now(self.agreement)  # the interpreter's end may abort a thread of gloo
        sys.exit(128 + self.agreement)

    def leave_now(self) -> NoReturn:
        """End this process where it is."""
        signum = self.agreement or self.heard
        tell(f"stopped by {name_of(signum)}; {self.how_to_go_on()}")
        exit_now(signum)

    def how_to_go_on(self) -> str:
        whole = list_checkpoints(self.output_dir)
        if not whole:
            return "there is no checkpoint yet"
        return f"--resume_from_checkpoint latest goes on from {whole[-1]}"


def do_nothing(signum: int, frame: FrameType | None) -> None:
    """With a handler a signal is written to the socket and does nothing else."""


def leave_signals_to_parent(worker: int) -> None:
    """A data loader's worker ends when its parent wants it to: launchers and terminals send their
    signals to it too, and without it no step could be ended."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def forget_signals() -> None:
    """A forked process shares the socket, where nobody must hear what it is sent."""
    if signal.getsignal(signal.SIGTERM) is do_nothing:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to act on


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_signals)


def name_of(signum: int) -> str:
    return signal.Signals(signum).name


def tell(line: str) -> None:
    """Print a line of its own, after any progress bar, once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        print(f"\n{line}", file=sys.stderr, flush=True)


def exit_now(signum: int) -> NoReturn:
    """End this process and its children as a shell expects it of one that a signal stopped."""
    sys.stdout.flush()
    sys.stderr.flush()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(128 + signum)
