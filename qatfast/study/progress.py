"""Progress bars on standard error; nothing is written where that is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from .training import Epoch

OnEpoch = Callable[["Epoch"], None]


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
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


class StudyBar:
    """A bar for all epochs of the study, with a second one for the training under way.

    Args:
        total: epochs of all trainings together.
        epochs: of one training.
    """

    def __init__(self, total: int, epochs: int) -> None:
        self._bar = _bar(Console(stderr=True))
        self._whole: TaskID = self._bar.add_task("whole study, epochs", total=total, figures="")
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
        now = self._now = self._bar.add_task(f"{name}, epoch", total=self._epochs, figures="")

        def show(epoch: Epoch) -> None:
            self._bar.update(now, completed=epoch.number, figures=_figures(epoch))
            self._bar.advance(self._whole)

        return show
