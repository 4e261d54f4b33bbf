"""Training and evaluation of the networks of the study, and the progress that a terminal shows."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

from .data import Dataset


@dataclass(frozen=True)
class Epoch:
    """Loss and accuracy of one epoch.

    Args:
        number: Number of the epoch, from 1.
        train_loss: Mean cross entropy (nats) over the batches of the epoch, with the weights of each batch.
        train_accuracy: Share of training samples classified correctly, with the weights of each batch.
        test_loss: Mean cross entropy (nats) on the test samples after the epoch.
        test_accuracy: Share of test samples classified correctly after the epoch.
    """

    number: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float


OnEpoch = Callable[[Epoch], None]


@dataclass
class History:
    """The figures of :class:`Epoch` as lists with one element per epoch."""

    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)

    def append(self, epoch: Epoch) -> None:
        """Appends the figures of one epoch to the lists."""
        for name, values in vars(self).items():
            values.append(getattr(epoch, name))


@dataclass(frozen=True)
class Evaluation:
    """Loss and accuracy of a model on samples that it was not trained on.

    Args:
        loss: Mean cross entropy (nats).
        accuracy: Share of samples classified correctly.
    """

    loss: float
    accuracy: float


def divergence(history: History, chance: float, test_samples: int) -> str:
    """Returns a text that says how a training failed, or an empty string if it did not fail.

    Args:
        history: Loss and accuracy of the training.
        chance: Share of the most frequent class, which is the accuracy of always guessing it.
        test_samples: Number of samples on which the accuracy was measured.

    Returns:
        ``the loss is not finite``; ``the accuracy is that of guessing`` if it is at most two standard deviations of a
        binomial share above chance; ``the loss rose`` if the last training loss is at least 1.25 times the lowest loss
        and at least 0.1 nats higher.
    """
    if not all(math.isfinite(loss) for loss in (*history.train_loss, history.test_loss[-1])):
        return "the loss is not finite"
    if history.test_accuracy[-1] <= chance + 2 * math.sqrt(chance * (1 - chance) / test_samples):
        return "the accuracy is that of guessing"
    lowest, last = min(history.train_loss), history.train_loss[-1]
    return "the loss rose" if last >= 1.25 * lowest and last >= lowest + 0.1 else ""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Sets the seed of torch's CPU generator inside the block, and restores the caller's generator after it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def train_model(
    model: nn.Module,
    data: Dataset,
    *,
    epochs: int = 20,
    learning_rate: float = 1e-3,
    batch_size: int = 32,
    seed: int = 42,
    on_epoch: OnEpoch | None = None,
) -> History:
    """Trains ``model`` in place with Adam and cross entropy on shuffled batches.

    The learning rate falls along half a cosine, to 0 after the last step.

    Args:
        model: Maps (batch, features) to (batch, classes). It is on the device of ``data``.
        data: Training and test samples. The test samples are only measured, never learned from.
        epochs: Passes over the training samples.
        learning_rate: Learning rate of Adam in the first step.
        batch_size: Samples per step. The last batch of an epoch may be smaller.
        seed: Seed of the order of the samples. The same seed and model give the same weights on the same machine.
        on_epoch: Called after each epoch. If None, a terminal shows a progress bar.

    Returns:
        Loss and accuracy on training and test samples after each epoch.
    """
    if on_epoch is None:
        with training_bar(epochs) as show:
            return train_model(
                model,
                data,
                epochs=epochs,
                learning_rate=learning_rate,
                batch_size=batch_size,
                seed=seed,
                on_epoch=show,
            )
    history = History()
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
    count = len(data.train_labels)
    falling = CosineAnnealingLR(optimizer, epochs * math.ceil(count / batch_size))
    for number in range(1, epochs + 1):
        model.train()
        loss_sum, correct = torch.zeros(2, device=data.train_inputs.device)
        for batch in torch.randperm(count, generator=order).to(data.train_inputs.device).split(batch_size):
            labels = data.train_labels[batch]
            scores = model(data.train_inputs[batch])
            loss = cross_entropy(scores, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            falling.step()
            loss_sum += loss.detach() * len(batch)
            correct += (scores.detach().argmax(1) == labels).sum()
        test = evaluate_model(model, data.test_inputs, data.test_labels)
        epoch = Epoch(number, float(loss_sum) / count, float(correct) / count, test.loss, test.accuracy)
        history.append(epoch)
        on_epoch(epoch)
    return history


@torch.no_grad()
def evaluate_model(model: nn.Module, inputs: Tensor, labels: Tensor, *, batch_size: int = 256) -> Evaluation:
    """Measures loss and accuracy of ``model``. Of equal highest scores the first class counts.

    If a model takes its quantization ranges from the batch, the result depends on ``batch_size``.

    Args:
        model: Maps (batch, features) to (batch, classes). It is in evaluation mode during the measurement.
        inputs: (samples, features).
        labels: (samples,), int64.
        batch_size: Samples per batch.

    Returns:
        Mean cross entropy (nats) and share of samples classified correctly.
    """
    training = model.training
    model.eval()
    try:
        scores = torch.cat([model(batch) for batch in inputs.split(batch_size)])
    finally:
        model.train(training)
    correct = int((scores.argmax(1) == labels).sum())
    return Evaluation(float(cross_entropy(scores, labels)), correct / len(labels))


class _Bars(Progress):
    """Progress bars below a heading of their own line, so that the figures fit into 80 columns."""

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
    """Shows a bar for one training: epoch, test loss, test accuracy and time left."""
    with _bar(Console(stderr=True)) as bar:
        task = bar.add_task("epoch", total=epochs, figures="")
        yield lambda epoch: bar.update(task, completed=epoch.number, figures=_figures(epoch))


def study_progress(trainings: int, epochs: int) -> StudyBar | StudyLines:
    """Returns bars if standard output and error are terminals, otherwise one line per training on standard output."""
    terminal = sys.stdout.isatty() and sys.stderr.isatty()
    return StudyBar(trainings * epochs, epochs) if terminal else StudyLines(trainings, epochs)


class StudyLines:
    """Prints one line when a training ends: its number, name and accuracy.

    Args:
        trainings: Number of trainings.
        epochs: Epochs of one training.
    """

    def __init__(self, trainings: int, epochs: int) -> None:
        self._trainings, self._epochs, self._begun = trainings, epochs, 0

    def __enter__(self) -> StudyLines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def training(self, name: str) -> OnEpoch:
        """Begins one training, and returns a function that prints its line after the last epoch."""
        self._begun += 1
        start = f"{self._begun:>{len(str(self._trainings))}}/{self._trainings}  {name}:"

        def show(epoch: Epoch) -> None:
            if epoch.number == self._epochs:
                print(f"{start} {_figures(epoch)}", flush=True)

        return show


class StudyBar:
    """Shows a bar for the whole study, and a second bar for the current training with its name above.

    Args:
        total: Epochs of all trainings together.
        epochs: Epochs of one training.
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
        """Begins the bar of one training, and returns a function that shows its epochs."""
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
