"""What a person sees of a running training: the progress bar, the log line, the curve."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from ..runs import RunFolder, Sample, write_bytes


class Follower(Protocol):
    """What may look on while a run trains, such as a monitor; nothing that it does changes the training."""

    def begin(self, step: int, steps: int) -> None:
        """Training begins behind `step`; it is to take `steps` in all."""

    def advance(self, step: int) -> None:
        """One optimiser step is done."""

    def record(self, line: Mapping[str, Any]) -> None:
        """A line was added to metrics.jsonl."""

    def show_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Dev rows were answered."""

    def drew(self, step: int, path: Path) -> None:
        """The curve was drawn anew."""


class TrainingDisplay:
    """A progress bar with loss, speed and ETA, and one log line per `log_every` steps that stays on the screen."""

    def __init__(
        self,
        run: RunFolder | None,
        *,
        total_steps: int,
        first_step: int,
        console: Console,
        followers: Sequence[Follower] = (),
    ) -> None:
        self._run, self._total, self._console = run, total_steps, console  # no run: another process writes into it
        self._first, self._started = first_step, time.monotonic()
        self._tokens = 0
        self._followers = followers
        self._paused = 0.0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("training", total=total_steps, completed=first_step, status="starting …")

    def __enter__(self) -> TrainingDisplay:
        self._bar.start()
        for follower in self._followers:
            follower.begin(self._first, self._total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def leave_out(self, seconds: float) -> None:
        """Do not count `seconds` spent scoring in the training speed; the ETA counts steps only."""
        self._paused += seconds

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, soft_wrap=True)

    def advance(self, step: int, num_tokens: int) -> None:
        """One optimiser step is done."""
        self._tokens += num_tokens
        self._bar.update(self._task, completed=step, status=f"step {step}/{self._total}  ETA {self._eta(step)}")
        for follower in self._followers:
            follower.advance(step)

    def record(self, line: Mapping[str, Any]) -> None:
        """Add `line` to metrics.jsonl and tell the followers of it."""
        if self._run is not None:
            self._run.append_metrics(dict(line))
        for follower in self._followers:
            follower.record(line)

    def show_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Add `samples` to samples.jsonl and tell the followers of them."""
        if self._run is not None:
            self._run.append_samples(step, samples)
        for follower in self._followers:
            follower.show_samples(step, samples)

    def drew(self, step: int) -> None:
        """Tell the followers that the run's curve was drawn anew."""
        if self._run is not None:
            for follower in self._followers:
                follower.drew(step, self._run.curve)

    def log(
        self,
        *,
        step: int,
        epoch: float,
        loss: float,
        task_losses: Mapping[str, float],
        learning_rate: float,
        grad_norm: float,
        seconds: float,
        memory_bytes: int,
        price_per_hour: float | None = None,
    ) -> None:
        """Print and store the log line.

        Args:
            step: optimiser steps done.
            epoch: passes over the rows done.
            loss: the mean since the last line.
            task_losses: the same for each task.
            learning_rate: of the last step.
            grad_norm: of the last step.
            seconds: time spent on the run so far, scoring included.
            memory_bytes: the most that this process has taken so far.
            price_per_hour: what an hour costs; the line then tells the price so far.
        """
        line: dict[str, Any] = {
            "kind": "train",
            "step": step,
            "epoch": round(epoch, 4),
            "loss": loss,
            "task_losses": dict(task_losses),
            "learning_rate": learning_rate,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,  # float16 gradients may overflow
            "tokens_per_second": round(self._tokens / max(self._elapsed(), 1e-9), 1),
            "seconds": round(seconds, 3),
            "memory_bytes": memory_bytes,
        }
        if price_per_hour is not None:
            line["price"] = seconds / 3600 * price_per_hour
        self.record(line)
        parts = "  ".join(f"{task} {value:.3f}" for task, value in task_losses.items())
        self.say(
            f"step {step}/{self._total} ({step / self._total:.0%})  epoch {epoch:.2f}  loss {loss:.4f}  "
            f"{f'({parts})  ' if len(task_losses) > 1 else ''}"
            f"lr {learning_rate:.2e}  {line['tokens_per_second']:.0f} tokens/s  ETA {self._eta(step)}"
        )

    def _elapsed(self) -> float:
        return time.monotonic() - self._started - self._paused

    def _eta(self, step: int) -> str:
        done = step - self._first
        return format_seconds(self._elapsed() / done * (self._total - step)) if done else "?"


def format_seconds(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def draw_curve(path: Path, metrics: Sequence[dict[str, Any]]) -> None:
    """Draw loss over steps, and the dev scores where there are any, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [line for line in metrics if line["kind"] == "train"]
    scored = [line for line in metrics if line["kind"] == "dev"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([line["step"] for line in train], [line["loss"] for line in train], label="train loss", color="tab:blue")
    if scored:
        steps = [line["step"] for line in scored]
        axes.plot(steps, [line["loss"] for line in scored], "o-", label="dev loss", color="tab:orange")
    if scored and scored[-1]["scores"]:
        right = axes.twinx()
        for number, task in enumerate(scored[-1]["scores"]):
            values = [line["scores"].get(task, {}).get("primary", float("nan")) for line in scored]
            right.plot(steps, values, "s--", label=f"{task}", color=f"C{number + 2}")
        right.set_ylim(0, 1.02)
        right.set_ylabel("dev score")
        right.legend(loc="center right")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per token")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right")
    axes.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, dpi=120, format="png")
    write_bytes(path, image.getvalue())
