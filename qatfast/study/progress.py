"""Progress: bars on a terminal, one line per training where there is none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from .training import Epoch

OnEpoch = Callable[["Epoch"], None]


class _Bars(Progress):
    """Progress bars below a line that says what is under way, so that the figures fit into 80 columns."""

    heading = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.heading:
            yield Text(self.heading, no_wrap=True, overflow="ellipsis")
        yield self.make_tasks_table(self.tasks)


def _bar(console: Console) -> _Bars:
    return _Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


def _figures(epoch: Epoch) -> str:
    return f"loss {epoch.test_loss:.3f}  accuracy {epoch.test_accuracy:.1%}"


@contextmanager
def training_bar(epochs: int) -> Iterator[OnEpoch]:
    """A bar for one training: epoch, test loss, test accuracy and time left."""
    with _bar(Console(stderr=True)) as bar:
        task = bar.add_task("epoch", total=epochs, figures="")
        yield lambda epoch: bar.update(task, completed=epoch.number, figures=_figures(epoch))


def study_progress(trainings: int, epochs: int) -> StudyBar | StudyLines:
    """Bars where standard output and standard error are terminals, else a line per training on standard output."""
    terminal = sys.stdout.isatty() and sys.stderr.isatty()
    return StudyBar(trainings * epochs, epochs) if terminal else StudyLines(trainings, epochs)


class StudyLines:
    """One line when a training ends: its number, name and accuracy.

    Args:
        trainings: how many there are.
        epochs: of one training.
    """

    def __init__(self, trainings: int, epochs: int) -> None:
        self._trainings, self._epochs, self._begun = trainings, epochs, 0

    def __enter__(self) -> StudyLines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def training(self, name: str) -> OnEpoch:
        """Begins one training; the result prints its line after the last epoch."""
        self._begun += 1
        start = f"{self._begun:>{len(str(self._trainings))}}/{self._trainings}  {name}:"

        def show(epoch: Epoch) -> None:
            if epoch.number == self._epochs:
                print(f"{start} {_figures(epoch)}", flush=True)

        return show


class StudyBar:
    """A bar for all epochs of the study, with a second one for the training under way and its name above.

    Args:
        total: epochs of all trainings together.
        epochs: of one training.
    """

    def __init__(self, total: int, epochs: int) -> None:
        self._bar = _bar(Console(stderr=True))
        self._whole: TaskID = self._bar.add_task("whole study", total=total, figures="")
        self._epochs = epochs
        self._now: TaskID | None = None

    def __enter__(self) -> StudyBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def training(self, name: str) -> OnEpoch:
        """Begins the bar of one training; the result shows its epochs."""
        if self._now is not None:
            self._bar.remove_task(self._now)
        self._bar.heading = name
        now = self._now = self._bar.add_task("epoch", total=self._epochs, figures="")

        def show(epoch: Epoch) -> None:
            self._bar.update(now, completed=epoch.number, figures=_figures(epoch))
            self._bar.advance(self._whole)
            if self._bar.finished:
                self._bar.heading = "trained; measuring the time of a training step"

        return show
