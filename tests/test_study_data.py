"""The data of the study: content, split, and the errors for bad files."""

import random
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from qatfast import cli
from qatfast.study import DataError, generate_dataset, load_samples, split
from qatfast.study.data import Samples, label_columns

REGRESSION = (
    r"40 different numbers in \d+ samples, a regression target; expected classes: text, or whole numbers with"
)
GOOD_ROWS = "".join(f"{i},{i % 3}.5,{'yes' if i % 2 else 'no'}\n" for i in range(20))


def write(tmp_path, text, name="table.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return str(path)


def test_generated_data_is_the_tutorials():
    data = generate_dataset()
    assert data.train_inputs.shape == (1600, 10) and data.test_inputs.shape == (400, 10)
    assert data.train_inputs.dtype == torch.float32 and data.train_labels.dtype == torch.int64
    for inputs, labels in ((data.train_inputs, data.train_labels), (data.test_inputs, data.test_labels)):
        assert torch.equal(labels, (inputs.double().sum(1) > 0).long())
    every = torch.cat([data.train_inputs, data.test_inputs])
    assert abs(float(every.mean())) < 0.03 and abs(float(every.std()) - 1) < 0.03


def test_the_seed_decides_the_samples_and_the_split():
    first, same, second = generate_dataset(seed=1), generate_dataset(seed=1), generate_dataset(seed=2)
    assert torch.equal(first.train_inputs, same.train_inputs)
    assert torch.equal(first.test_labels, same.test_labels)
    assert not torch.equal(first.train_inputs, second.train_inputs)
    digits = load_samples("digits")
    assert not torch.equal(split(digits, seed=1).test_labels, split(digits, seed=2).test_labels)


def test_digits():
    data = split(load_samples("digits"), seed=0)
    assert (data.in_features, data.num_classes) == (64, 10)
    assert len(data.train_labels) == 1437 and len(data.test_labels) == 360
    assert data.train_inputs.min() == 0 and data.train_inputs.max() == 1
    # The split is stratified: each class has the same share of training and test samples.
    assert torch.bincount(data.test_labels).min() >= 34 and torch.bincount(data.test_labels).max() <= 38


def test_mnist1d_is_the_same_every_time_and_leaves_the_random_numbers_alone(tmp_path, monkeypatch):
    data = pytest.importorskip("mnist1d.data")
    monkeypatch.chdir(tmp_path)
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.random()
    random.seed(1)
    np.random.seed(1)
    samples = load_samples("mnist1d", seed=7)
    assert (random.random(), np.random.random()) == expected
    assert list(tmp_path.iterdir()) == []
    assert samples.inputs.shape == (4000, 40) and samples.class_names == tuple("0123456789")
    assert np.bincount(samples.labels).tolist() == [400] * 10
    again = load_samples("mnist1d", seed=8)
    assert np.array_equal(samples.inputs, again.inputs) and np.array_equal(samples.labels, again.labels)
    arguments = data.get_dataset_args()
    arguments.num_samples = 4000
    made = data.make_dataset(arguments)
    assert np.array_equal(samples.inputs[:3200], made["x"]) and np.array_equal(
        samples.labels[3200:], made["y_test"]
    )


@pytest.mark.parametrize("missing", ["mnist1d", "requests"])
def test_mnist1d_without_its_package_is_one_clear_error(monkeypatch, capsys, missing):
    for name in [name for name in sys.modules if name.partition(".")[0] == "mnist1d"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    if missing != "mnist1d" and find_spec("mnist1d") is None:
        pytest.skip("mnist1d is not installed")
    assert cli.main(["compare", "--data", "mnist1d"]) == 1
    said = f"qatfast compare: --data mnist1d needs the package {missing}: pip install mnist1d\n"
    assert capsys.readouterr() == ("", said)


def test_training_and_test_samples_do_not_overlap():
    samples = Samples("numbered", np.arange(50.0).reshape(50, 1), np.arange(50) % 2, ("a", "b"))
    data = split(samples, seed=3)
    seen = torch.cat([data.train_inputs, data.test_inputs]).flatten()
    assert sorted(seen.tolist()) == list(range(50))


def test_csv_with_text_labels_and_its_own_units(tmp_path):
    text = "\ufeffwidth , kind,height\n" + "".join(
        f'{1000 + i},"{"cat, big" if i % 2 else "dog"}",{-i}e-3\n' for i in range(40)
    )
    samples = load_samples(write(tmp_path, text), "kind")
    assert samples.class_names == ("cat, big", "dog")
    assert samples.inputs.shape == (40, 2)
    assert samples.inputs[3].tolist() == [1003, -0.003] and samples.labels[3] == 0
    data = split(samples, seed=0)
    torch.testing.assert_close(data.train_inputs.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.train_inputs.std(0, correction=0), torch.ones(2), atol=1e-5, rtol=0)
    # The test samples are scaled with mean and deviation of the training samples, not with their
    # own.
    assert float(data.test_inputs.mean(0).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "text, inputs, note",
    [
        (
            "a;b;y\n1,5;2;no\n-,25;1e1;no\n3;4;yes\n4;5;yes\n",
            [[1.5, 2], [-0.25, 10], [3, 4], [4, 5]],
            "semicolons, decimal commas",
        ),
        (
            "a;b;y\n1.5;2;no\n3;4;yes\n" * 1 + "1;1;no\n2;2;yes\n",
            [[1.5, 2], [3, 4], [1, 1], [2, 2]],
            "semicolons",
        ),
        ("a\tb\ty\n1\t2\tno\n3\t4\tyes\n1\t1\tno\n2\t2\tyes\n", [[1, 2], [3, 4], [1, 1], [2, 2]], "tabs"),
        # The names contain as many commas as semicolons.
        (
            "a, cm;b, dB;y\n1,5;2,5;no\n3,5;4,5;yes\n1,0;1,0;no\n2,0;2,0;yes\n",
            [[1.5, 2.5], [3.5, 4.5], [1, 1], [2, 2]],
            "semicolons, decimal commas",
        ),
        ("a,b;c,y\n1,2,no\n3,4,yes\n1,1,no\n2,2,yes\n", [[1, 2], [3, 4], [1, 1], [2, 2]], ""),
        (
            "a,b,y\ntrue,1,True\nFalse,0,False\nTRUE,0,True\nfalse,1,False\n",
            [[1, 1], [0, 0], [1, 0], [0, 1]],
            "",
        ),
        ("0,1,y\n1,2,no\n3,4,yes\n1,1,no\n2,2,yes\n", [[1, 2], [3, 4], [1, 1], [2, 2]], ""),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_csv_as_other_programs_write_it(tmp_path, text, inputs, note, encoding):
    samples = load_samples(write(tmp_path, text, encoding=encoding), "y")
    assert samples.inputs.tolist() == inputs and samples.note == note and samples.name == "table.csv"
    assert len(samples.class_names) == 2


def test_numbers_that_are_classes_stay_classes(tmp_path):
    stars = "a,y\n" + "".join(f"{i},{(i % 10 + 1) / 2}\n" for i in range(40))
    assert len(load_samples(write(tmp_path, stars), "y").class_names) == 10
    hundred = "a,y\n" + "".join(f"{i},{i % 100}\n" for i in range(500))
    assert len(load_samples(write(tmp_path, hundred), "y").class_names) == 100
    path = tmp_path / "whole.npz"
    np.savez(path, x=np.ones((6, 2)), y=np.array([0.0, 1.0] * 3))
    assert load_samples(str(path), "y").class_names == ("0", "1")


def test_label_columns(tmp_path):
    assert label_columns(write(tmp_path, "a;b;y\n1;2;no\n")) == ["a", "b", "y"]
    np.savez(tmp_path / "arrays.npz", x=np.ones(2), y=np.ones(2))
    assert label_columns(str(tmp_path / "arrays.npz")) == ["x", "y"]
    with pytest.raises(DataError, match="cannot be read"):
        label_columns(str(tmp_path / "none.csv"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        load_samples(str(tmp_path / "folder.csv"), "y")


def test_a_constant_column_stays_finite(tmp_path):
    text = "a,b,y\n" + "".join(f"{i},7,{i % 2}\n" for i in range(20))
    data = split(load_samples(write(tmp_path, text), "y"), seed=0)
    assert torch.equal(data.train_inputs[:, 1], torch.zeros(16))


@pytest.mark.parametrize(
    "text, target, message",
    [
        ("a,b,y\n" + GOOD_ROWS, "z", r"no column 'z'; the columns are 'a', 'b', 'y'$"),
        ("a,b,y\n1,x3,no\n" + GOOD_ROWS, "y", r"line 2, column 'b': 'x3' is not a number"),
        ("a,b,y\n" + GOOD_ROWS + "1,nan,no\n", "y", r"line 22, column 'b': nan is not a finite number"),
        ("a,b,y\n" + GOOD_ROWS + "inf,1,no\n", "y", r"line 22, column 'a': inf is not a finite number"),
        ("a,b,y\n1,,no\n" + GOOD_ROWS, "y", r"line 2, column 'b': the cell is empty"),
        ("a,b,y\n1,2, \n" + GOOD_ROWS, "y", r"line 2, column 'y': the label is empty"),
        ("a,b,y\n1,2\n" + GOOD_ROWS, "y", r"line 2 has 2 cells, the header has 3"),
        ("a,a,y\n" + GOOD_ROWS, "y", r"two columns are named 'a'"),
        ("y\nno\nyes\n", "y", r"'y' is the only column"),
        ("a,b,y\n" + GOOD_ROWS.replace("yes", "no"), "y", r"column 'y' holds 1 class \('no'\); at least two"),
        ("a,b,y\n" + GOOD_ROWS, "a", r"column 'b'|column 'y': 'no' is not a number"),
        (
            "a,y\n" + "".join(f"1,{i}\n" for i in range(9)),
            "y",
            r"9 classes in 9 samples, and class '0' has only one",
        ),
        (
            "a,y\n" + "".join(f"1,{i // 2}\n" for i in range(40)),
            "y",
            r"cannot be split into training and test",
        ),
        ("a,b,y\n", "y", r"expected a header and at least one row, got 1 line"),
        (
            "1,2,no\n" + GOOD_ROWS,
            "y",
            r"no column 'y'; the columns are .*line 1 holds numbers: is the header missing\?",
        ),
        (
            "3,1,0\n" + GOOD_ROWS.replace("yes", "1").replace("no", "0"),
            "0",
            r"line 1 holds only numbers, so it is no",
        ),
        (",b,y\n" + GOOD_ROWS, "y", r"column 1 has no name; if it only counts the rows, remove it"),
        ("Unnamed: 0,b,y\n" + GOOD_ROWS, "y", r"column 1 has no name"),
        ("a,b,y\n" + GOOD_ROWS + "1,2,NaN\n", "y", r"line 22, column 'y': the label is NaN"),
        (
            "a,y\n" + "".join(f"1,{i % 2}{'.0' * (i > 9)}\n" for i in range(20)),
            "y",
            r"one number in two ways",
        ),
        (
            "a;y\n" + "".join(f"{i}{',.'[i == 7]}5;{i % 2}\n" for i in range(9)),
            "y",
            r"'75|'7.5' has a decimal point",
        ),
        (
            "a;y\n" + "".join(f"1.00{i},5;{i % 2}\n" for i in range(9)),
            "y",
            r"'1.000,5' has a comma and a point",
        ),
        ("a,y\n" + "".join(f"1,{i * 0.37:.2f}\n" for i in range(40)), "y", REGRESSION),
        (
            "a,y\n" + "".join(f"1,{i * 0.1:.1f}\n" for i in list(range(30)) * 9),
            "y",
            r"30 different numbers in 270",
        ),
        ("a,y\n" + "".join(f"1,{i // 2}000\n" for i in range(80)), "y", REGRESSION),
        ("a;y\n" + "".join(f"1;{i},25\n" for i in range(40)), "y", REGRESSION),
        ("", "y", r"got 0 line"),
        (
            "a,y\n1e300,0\n-1e300,1\n" + "".join(f"{i},{i % 2}\n" for i in range(20)),
            "y",
            r"too large for float32",
        ),
    ],
)
def test_bad_csv(tmp_path, text, target, message):
    with pytest.raises(DataError, match=message) as caught:
        split(load_samples(write(tmp_path, text), target), seed=0)
    assert "table.csv" in str(caught.value) and "\n" not in str(caught.value)


def test_csv_that_is_no_text(tmp_path):
    with pytest.raises(DataError, match="is not UTF-8 text"):
        load_samples(write(tmp_path, "größe,y\n1,2\n", encoding="latin-1"), "y")
    path = tmp_path / "zeros.csv"
    path.write_bytes(b"a,y\n1,\0\n" + b'"' + b"x" * 200_000)
    with pytest.raises(DataError, match=r"zeros\.csv"):
        load_samples(str(path), "y")


def test_missing_file_and_missing_target(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        load_samples(str(tmp_path / "none.csv"), "y")
    with pytest.raises(DataError, match="no target"):
        load_samples(write(tmp_path, "a,y\n1,0\n"))


def test_npz_arrays_become_features_side_by_side(tmp_path):
    path = tmp_path / "arrays.npz"
    images = np.arange(240.0).reshape(20, 3, 4)
    np.savez(path, images=images, age=np.arange(20), label=np.array([0, 5] * 10))
    samples = load_samples(str(path), "label")
    assert samples.inputs.shape == (20, 13) and samples.class_names == ("0", "5")
    assert samples.inputs[2].tolist() == [*images[2].flatten(), 2]
    assert samples.labels.tolist() == [0, 1] * 10


FEATURES = {"x": np.ones((6, 2))}


@pytest.mark.parametrize(
    "arrays, message",
    [
        (FEATURES, r"no array 'y'; the arrays are 'x'"),
        ({"y": np.array([0, 1] * 3)}, r"'y' is the only array"),
        (
            {**FEATURES, "y": np.linspace(0, 1, 6)},
            r"must hold one integer or text label per sample, got shape \(6,\) of float64 with fractions, a regression",
        ),
        ({**FEATURES, "y": np.array([0, 1, np.nan] * 2)}, r"array 'y', sample 2: NaN or infinite"),
        (
            {**FEATURES, "y": np.zeros((6, 1), int)},
            r"must hold one integer or text label per sample, got shape \(6, 1\)",
        ),
        ({**FEATURES, "y": np.array([0, 1])}, r"array 'x' has shape \(6, 2\), 'y' has 2 labels"),
        ({"x": np.array(["a"] * 6), "y": np.array([0, 1] * 3)}, r"array 'x' holds <U1, not numbers"),
        ({"x": np.full((6, 2), np.nan), "y": np.array([0, 1] * 3)}, r"array 'x', sample 0: NaN or infinite"),
        ({**FEATURES, "y": np.zeros(6, int)}, r"array 'y' holds 1 class"),
        ({"x": np.ones((6, 0)), "y": np.array([0, 1] * 3)}, r"no features"),
        (
            {"x": np.array([{}] * 6, dtype=object), "y": np.array([0, 1] * 3)},
            r"not an .npz archive of plain arrays",
        ),
    ],
)
def test_bad_npz(tmp_path, arrays, message):
    path = tmp_path / "arrays.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=message):
        load_samples(str(path), "y")


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 broken"])
def test_npz_that_is_none(tmp_path, content):
    path = tmp_path / "arrays.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"not an \.npz archive"):
        load_samples(str(path), "y")


def test_npy_under_the_name_npz(tmp_path):
    path = tmp_path / "arrays.npz"
    with path.open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(DataError, match=r"not an \.npz archive; save features and labels with numpy\.savez"):
        load_samples(str(path), "y")
