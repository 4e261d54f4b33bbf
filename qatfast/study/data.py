"""The data of the study, built in or a file of the user, split into training and test samples."""

from __future__ import annotations

import csv
import io
import itertools
import random
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits as sklearn_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

TEST_SHARE = 0.2
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
MISSING = ("", "nan")
SAMPLES_PER_NUMBER = 5
"""More than 20 different whole numbers with fewer samples per number are a regression target, not classes."""


class DataError(ValueError):
    """A file cannot be used as data. The message is one line that says what to change in it."""


@dataclass(frozen=True)
class Samples:
    """All samples of a data set, not yet split.

    Args:
        name: Name in the report.
        inputs: (samples, features), float64, in the units of the source.
        labels: (samples,), int64, from 0 to classes - 1.
        class_names: Name of each label.
        standardize: Whether a split scales each feature to mean 0 and standard deviation 1 of its training samples.
        note: How the file was read, if its format had to be guessed.
        shape: Height and width of images, length of signals; () if the order of the features means nothing.
    """

    name: str
    inputs: NDArray[np.float64]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    standardize: bool = False
    note: str = ""
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """Training and test samples.

    Args:
        name: Name in the report.
        train_inputs: (samples, features), float32.
        train_labels: (samples,), int64.
        test_inputs: (samples, features), float32.
        test_labels: (samples,), int64.
        class_names: Name of each label.
    """

    name: str
    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]

    @property
    def in_features(self) -> int:
        """Number of features of one sample."""
        return self.train_inputs.shape[1]

    @property
    def num_classes(self) -> int:
        """Number of different labels."""
        return len(self.class_names)

    def to(self, device: str | torch.device) -> Dataset:
        """Returns the same samples on ``device``."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def generate_dataset(num_samples: int = 2000, num_features: int = 10, *, seed: int = 42) -> Dataset:
    """Generates the data of tutorials: normal features, ``label = 1 if sum(features) > 0 else 0``, split 80/20.

    Args:
        num_samples: Number of training and test samples together.
        num_features: Number of features of one sample.
        seed: Seed of the features and of the split, from 0 to 2^32 - 1.

    Returns:
        The split data with float32 features and int64 labels 0 and 1.

    Example:
        >>> data = generate_dataset()
        >>> data.train_inputs.shape, data.test_inputs.shape
        (torch.Size([1600, 10]), torch.Size([400, 10]))
    """
    return split(synthetic_samples(num_samples, num_features, seed=seed), seed=seed)


def synthetic_samples(num_samples: int = 2000, num_features: int = 10, *, seed: int = 42) -> Samples:
    """Returns the samples of :func:`generate_dataset`, not yet split."""
    inputs = np.random.default_rng(seed).standard_normal((num_samples, num_features))
    labels = (inputs.sum(axis=1) > 0).astype(np.int64)
    return Samples("synthetic", inputs, labels, ("sum <= 0", "sum > 0"))


def digits_samples() -> Samples:
    """Returns the 1797 handwritten digits of 8 x 8 pixels that scikit-learn ships, with grey values from 0 to 1.

    Source:
        Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository.
    """
    digits = sklearn_digits()
    names = tuple(str(name) for name in digits.target_names)
    labels = digits.target.astype(np.int64)
    return Samples("handwritten digits", digits.data / 16.0, labels, names, shape=(8, 8))


def mnist1d_samples(num_samples: int = 4000) -> Samples:
    """Generates MNIST-1D: signals of 40 points in the shape of a digit, shifted, sheared and noisy.

    Simple networks classify 60 to 70 % of them correctly, so quantization has room to do damage. Nothing is downloaded
    or cached, and every call returns the same samples.

    Args:
        num_samples: Number of samples, a multiple of 10.

    Raises:
        DataError: The package ``mnist1d`` is not installed.

    Source:
        Greydanus and Kobak 2024, Scaling down deep learning with MNIST-1D (arXiv 2011.14439).
    """
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ImportError as error:
        package = (error.name or "mnist1d").partition(".")[0]
        raise DataError(f"--data mnist1d needs the package {package}: pip install mnist1d") from error
    arguments = get_dataset_args()
    arguments.num_samples, arguments.seed = num_samples, 42
    with _global_random_state():
        generated = make_dataset(arguments)
    inputs = np.concatenate([generated["x"], generated["x_test"]]).astype(np.float64)
    labels = np.concatenate([generated["y"], generated["y_test"]]).astype(np.int64)
    names = tuple(str(digit) for digit in range(10))
    return Samples("MNIST-1D", inputs, labels, names, shape=inputs.shape[1:])


@contextmanager
def _global_random_state() -> Iterator[None]:
    """Restores the global generators of Python and NumPy after the block."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def load_samples(data: str, target: str | None = None, *, seed: int = 42) -> Samples:
    """Loads the samples that ``--data`` and ``--target`` name.

    Args:
        data: ``synthetic``, ``digits``, ``mnist1d``, or the path of a .csv or .npz file.
        target: Column (.csv) or array (.npz) with the labels of a file, otherwise None.
        seed: Seed of the synthetic features.

    Returns:
        The samples, not yet split.

    Raises:
        DataError: The file cannot be used, or a package is missing. The message says where and why.
    """
    if data == "synthetic":
        return synthetic_samples(seed=seed)
    if data == "digits":
        return digits_samples()
    if data == "mnist1d":
        return mnist1d_samples()
    if target is None:
        raise DataError(f"{data}: no target is given; name the column or array that holds the labels")
    path = Path(data)
    load = load_npz if path.suffix.lower() == ".npz" else load_csv
    try:
        return load(path, target)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def load_csv(path: Path, target: str) -> Samples:
    """Reads a table with a header row: the column ``target`` holds the labels, and all other columns hold numbers.

    Cells are separated by commas, semicolons or tabs, whichever fits the header. With semicolons or tabs numbers may
    have a decimal comma. ``true`` and ``false`` count as 1 and 0.

    Args:
        path: Path of the file, which is UTF-8, or UTF-16 with a byte order mark.
        target: Name of the label column. Labels may be any text.

    Returns:
        One sample per row, one feature per column.

    Raises:
        DataError: A column, row or cell is wrong. The message names it.
    """
    table = _read_table(path, target)
    header, rows = table.header, table.rows
    _check_header(path, header, target)
    where = header.index(target)
    labels, inputs = [], np.empty((len(rows), len(header) - 1))
    decimal_comma = table.delimiter != "," and any(
        "," in cell for _, row in rows for cell in _without(row, where)
    )
    for index, (line, row) in enumerate(rows):
        if len(row) != len(header):
            raise DataError(f"{path}: line {line} has {len(row)} cells, the header has {len(header)}")
        if row[where].strip().lower() in MISSING:
            raise DataError(f"{path}: line {line}, column '{target}': the label is {_shown(row[where])}")
        labels.append(row[where].strip())
        features = zip(_without(header, where), _without(row, where), strict=True)
        inputs[index] = [_number(path, line, name, cell, decimal_comma) for name, cell in features]
    notes = [DELIMITERS[table.delimiter]] if table.delimiter != "," else []
    notes += ["decimal commas"] if decimal_comma else []
    return _own_samples(path, inputs, labels, f"column '{target}'", notes)


def label_columns(data: str) -> list[str]:
    """Returns what ``--target`` may name in a file: the columns of a .csv, the arrays of an .npz.

    Raises:
        DataError: The file cannot be read.
    """
    path = Path(data)
    try:
        return list(_read_npz(path)) if path.suffix.lower() == ".npz" else _read_table(path).header
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def load_npz(path: Path, target: str) -> Samples:
    """Reads a NumPy archive: the array ``target`` holds the labels, all others hold features with one sample per row.

    Args:
        path: Path of the file.
        target: Name of the label array: (samples,), whole numbers, booleans or text.

    Returns:
        One sample per row. The arrays of features are flattened to (samples, features) and concatenated.

    Raises:
        DataError: An array is missing or wrong. The message names it.
    """
    arrays = _read_npz(path)
    if target not in arrays:
        raise DataError(f"{path}: no array '{target}'; the arrays are {listing(list(arrays))}")
    labels = _labels(path, target, arrays.pop(target))
    if not arrays:
        raise DataError(f"{path}: '{target}' is the only array; at least one array of features is needed")
    features = []
    for name, array in arrays.items():
        if array.dtype.kind not in "iubf":
            raise DataError(f"{path}: array '{name}' holds {array.dtype}, not numbers")
        if array.ndim == 0 or len(array) != len(labels):
            raise DataError(
                f"{path}: array '{name}' has shape {array.shape}, '{target}' has {len(labels)} labels"
            )
        flat = array.reshape(len(array), -1).astype(np.float64)
        if not np.isfinite(flat).all():
            sample = int(np.argwhere(~np.isfinite(flat))[0, 0])
            raise DataError(f"{path}: array '{name}', sample {sample}: NaN or infinite; remove or replace it")
        features.append(flat)
    names = [label.decode() if isinstance(label, bytes) else str(label) for label in labels.tolist()]
    return _own_samples(path, np.concatenate(features, axis=1), names, f"array '{target}'")


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """Returns the arrays of an archive by name."""
    if path.is_file() and not zipfile.is_zipfile(path):
        raise DataError(f"{path}: is not an .npz archive; save features and labels with numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: is not an .npz archive of plain arrays ({_first_line(error)})") from error


def _labels(path: Path, target: str, labels: NDArray[Any]) -> NDArray[Any]:
    """Returns ``labels`` if they are one whole number, boolean or text per sample, and whole floats as integers."""
    wrong = f"{path}: array '{target}' must hold one integer or text label per sample, got "
    if labels.ndim != 1 or labels.dtype.kind not in "iubUSf":
        raise DataError(f"{wrong}shape {labels.shape} of {labels.dtype}")
    if labels.dtype.kind != "f":
        return labels
    if not np.isfinite(labels).all():
        raise DataError(
            f"{path}: array '{target}', sample {int(np.argmin(np.isfinite(labels)))}: NaN or infinite"
        )
    if (labels != np.round(labels)).any():
        raise DataError(
            f"{wrong}shape {labels.shape} of {labels.dtype} with fractions, a regression target; put the "
            "numbers into classes first, or name another target"
        )
    return labels.astype(np.int64)


def split(samples: Samples, *, seed: int = 42) -> Dataset:
    """Splits samples into 80 % for training and 20 % for testing, with the same share of each class in both.

    Args:
        samples: At least two samples per class.
        seed: Seed of the shuffling, from 0 to 2^32 - 1.

    Returns:
        float32 features, standardized with mean and deviation of the training samples if ``samples.standardize``.

    Raises:
        DataError: There are too few samples to split, or a number is too large for float32.
    """
    try:
        rows = train_test_split(
            np.arange(len(samples.labels)), test_size=TEST_SHARE, stratify=samples.labels, random_state=seed
        )
    except ValueError as error:
        raise DataError(f"{samples.name}: cannot be split into training and test samples: {error}") from error
    train, test = rows
    inputs = samples.inputs
    if samples.standardize:
        with np.errstate(over="ignore", invalid="ignore"):
            deviation = inputs[train].std(axis=0)
            deviation = np.where(np.isfinite(deviation), deviation, np.nan)  # too large to square
            inputs = (inputs - inputs[train].mean(axis=0)) / np.where(deviation == 0, 1.0, deviation)
    features = torch.from_numpy(inputs).float()
    if not features.isfinite().all():
        raise DataError(f"{samples.name}: a feature holds numbers too large for float32; use a smaller unit")
    labels = torch.from_numpy(samples.labels)
    return Dataset(
        samples.name, features[train], labels[train], features[test], labels[test], samples.class_names
    )


@dataclass(frozen=True)
class _Table:
    header: list[str]
    rows: list[tuple[int, list[str]]]
    """Line number and cells of each row that is not blank."""
    delimiter: str


def _read_table(path: Path, target: str | None = None) -> _Table:
    """Reads the table with the delimiter whose header has the target; of several, with that of the most columns."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder, not a .csv file")
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({_first_line(error)}); save it as UTF-8") from error
    if "\0" in text:
        raise DataError(f"{path}: is not a CSV table (it holds NUL characters)")

    def parsed(delimiter: str, limit: int | None = None) -> Iterator[tuple[int, list[str]]]:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        return itertools.islice(((reader.line_num, row) for row in reader if row), limit)

    def fit(delimiter: str) -> tuple[bool, bool, int]:
        header, *rows = [*parsed(delimiter, 20)] or [(1, [""])]
        names = [name.strip() for name in header[1]]
        several = len(names) > 1
        return target in names, several and all(len(row) == len(names) for _, row in rows), len(names)

    try:
        delimiter = max(DELIMITERS, key=fit)
        lines = list(parsed(delimiter))
    except csv.Error as error:
        raise DataError(f"{path}: is not a CSV table ({_first_line(error)})") from error
    if len(lines) < 2:
        raise DataError(f"{path}: expected a header and at least one row, got {len(lines)} line(s)")
    return _Table([name.strip() for name in lines[0][1]], lines[1:], delimiter)


def _check_header(path: Path, header: list[str], target: str) -> None:
    numbers = [name for name in header if _is_number(name)]
    counted = sorted(header) == sorted(map(str, range(len(header))))  # as pandas names them
    if target not in header or (len(numbers) == len(header) and not counted):
        hint = "; line 1 holds numbers: is the header missing?" if numbers and not counted else ""
        missing = target not in header
        problem = f"no column '{target}'" if missing else "line 1 holds only numbers, so it is no header"
        raise DataError(f"{path}: {problem}; the columns are {listing(header)}{hint if missing else ''}")
    unnamed = [index for index, name in enumerate(header, 1) if not name or name.startswith("Unnamed: ")]
    if unnamed:
        raise DataError(
            f"{path}: column {unnamed[0]} has no name; if it only counts the rows, remove it (pandas: "
            "to_csv(..., index=False)), else name it"
        )
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise DataError(f"{path}: two columns are named '{twice[0]}'; give each column its own name")
    if len(header) < 2:
        raise DataError(f"{path}: '{target}' is the only column; at least one feature column is needed")


def _number(path: Path, line: int, column: str, cell: str, decimal_comma: bool) -> float:
    where, text = f"{path}: line {line}, column '{column}'", cell.strip()
    if not text:
        raise DataError(f"{where}: the cell is empty; remove the row or fill it")
    if decimal_comma and "," in text and "." in text:
        raise DataError(
            f"{where}: '{text[:40]}' has a comma and a point; write thousands without a separator"
        )
    if decimal_comma and "." in text:
        raise DataError(
            f"{where}: '{text[:40]}' has a decimal point, and other cells a decimal comma; write all numbers alike"
        )
    if text.lower() in ("true", "false"):
        return float(text.lower() == "true")
    try:
        value = float(text.replace(",", ".") if decimal_comma else text)
    except ValueError:
        raise DataError(
            f"{where}: '{text[:40]}' is not a number; remove the column or encode it as numbers"
        ) from None
    if not np.isfinite(value):
        raise DataError(f"{where}: {text} is not a finite number; remove the row or replace it")
    return value


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text.replace(",", "."))))
    except ValueError:
        return False


def _without(cells: list[str], index: int) -> list[str]:
    return cells[:index] + cells[index + 1 :]


def _shown(cell: str) -> str:
    return cell.strip() or "empty"


def _own_samples(
    path: Path, inputs: NDArray[np.float64], names: Sequence[str], target: str, notes: Sequence[str] = ()
) -> Samples:
    """Returns the samples of a user's file after a check of its labels: two classes or more of two samples or more."""
    counts = Counter(names)
    if inputs.shape[1] == 0:
        raise DataError(f"{path}: the samples have no features")
    if len(counts) < 2:
        only = f" ('{next(iter(counts))}')" if counts else ""
        raise DataError(f"{path}: {target} holds {len(counts)} class{only}; at least two are needed")
    _check_classes(path, counts, target)
    class_names, labels = np.unique(np.asarray(names), return_inverse=True)
    classes = tuple(str(name) for name in class_names)
    return Samples(
        path.name, inputs, labels.astype(np.int64), classes, standardize=True, note=", ".join(notes)
    )


def _check_classes(path: Path, counts: Counter[str], target: str) -> None:
    """Raises DataError for a regression target, a class in two spellings, or a class of one sample."""
    samples, rare = sum(counts.values()), min(counts, key=lambda name: counts[name])
    if all(map(_is_number, counts)):
        values = {float(name.replace(",", ".")) for name in counts}
        fractions = any(value != round(value) for value in values)
        few = samples < SAMPLES_PER_NUMBER * len(counts)
        if (fractions and (len(counts) > 10 or counts[rare] < 2)) or (len(counts) > 20 and few):
            raise DataError(
                f"{path}: {target} holds {len(counts)} different numbers in {samples} samples, a regression target; "
                f"expected classes: text, or whole numbers with {SAMPLES_PER_NUMBER} samples or more of each; put the "
                "numbers into classes first, or name another target"
            )
        if len(values) < len(counts):
            raise DataError(
                f"{path}: {target} writes one number in two ways (as 1 and 1.0); write each class one way"
            )
    if counts[rare] < 2:
        raise DataError(
            f"{path}: {target} holds {len(counts)} classes in {samples} samples, and class '{rare[:40]}' has only "
            "one sample; each needs at least two"
        )


def listing(names: Sequence[str], most: int = 12) -> str:
    """Returns a text such as ``'a', 'b' and 3 more``."""
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def plural(count: int, word: str, many: str = "") -> str:
    """Returns a text such as ``1 epoch``, ``2 epochs``, or ``2 classes`` with ``many="classes"``."""
    return f"{count:,} {word if count == 1 else many or word + 's'}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
