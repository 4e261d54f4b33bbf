"""The results, files and page of a small study and of an interrupted study."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch

import cases
import qatfast
from qatfast.study import (
    Settings,
    Study,
    ThreeLayerNet,
    deployment,
    evaluate_model,
    experiments,
    quantize_layers,
    quantize_signal,
    run_study,
    split,
    write_report,
)
from qatfast.study.data import digits_samples, synthetic_samples
from qatfast.study.experiments import Run, count_trainings
from qatfast.study.networks import TITLES, config_code
from qatfast.study.report import FolderError, ReportFolder
from qatfast.study.results import as_json
from qatfast.study.size import load_quantized

SETTINGS = Settings(bits=(4, 2), epochs=1, seeds=2, timing_repetitions=3, every_model=True)
NOT_REPRODUCED = ("timing", "machine", "versions", "date")
FIGURES = 1 + 2 + 1 + 3 + 2
"""Number of figures: accuracy, training at 4 and 2 bits, errors, weights of 3 layers, 2 signals."""


def run(folder, settings=SETTINGS, samples=None):
    folder.mkdir()
    study = Study(settings, samples or digits_samples())
    run_study(study, folder)
    write_report(study, [quantize_signal(bits) for bits in settings.bits], folder, seconds=1.0)
    return study, json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "report"
    study, results = run(folder)
    return study, results, folder


class Page(HTMLParser):
    """Collects the tags, and raises an error if a tag is not closed."""

    VOID = ("meta", "img", "source")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_results_have_the_documented_shape(report):
    from qatfast.study import results as module

    _, results, _ = report
    documented = re.findall(r"^    (\w+)  ", module.__doc__, re.MULTILINE)
    assert set(documented) == set(results)
    assert results["complete"] is True
    assert results["settings"]["bits"] == [4, 2]
    assert results["network"] == {"layers": [64, 128, 128, 10], "parameters": 26_122}
    assert results["data"]["train_samples"] == 1437 and results["data"]["test_samples"] == 360
    assert len(results["versions"]) == 4


def test_every_model_is_measured_for_every_seed(report):
    _, results, _ = report
    found = {(run["seed"], run["model"], run["bits"]) for run in results["runs"]}
    expected = {
        (seed, model, bits)
        for seed in (42, 43)
        for model in TITLES
        for bits in ((32,) if model.startswith("fp32") else (4, 2))
    }
    assert found == expected and len(results["runs"]) == len(expected)
    for entry in results["accuracy"]:
        values = [
            run["accuracy"]
            for run in results["runs"]
            if (run["model"], run["bits"]) == (entry["model"], entry["bits"])
        ]
        assert entry["accuracy"]["values"] == values
        assert entry["accuracy"]["mean"] == pytest.approx(sum(values) / 2)
    assert {(entry["model"], entry["bits"]) for entry in results["histories"]} == {
        (model, bits)
        for model in ("fp32", "fp32_longer", "qat_tutorial", "qat_moving_average", "qat_learned")
        for bits in ((32,) if model.startswith("fp32") else (4, 2))
    }


def test_only_the_models_of_a_verdict_are_trained_by_default(tmp_path):
    settings = replace(SETTINGS, epochs=3, seeds=1, timing_repetitions=0, every_model=False)
    _, results = run(tmp_path / "report", settings, synthetic_samples(400))
    assert [entry["model"] for entry in results["accuracy"]] == [
        *("fp32", "fp32_longer"),
        *("ptq_mse",) * 2,
        *("qat_learned",) * 2,
    ]
    pairs = {(entry["model"], entry["against"]) for entry in results["differences"]}
    models = ("ptq_mse", "qat_learned")
    assert pairs == {*((model, "fp32_longer") for model in models), ("qat_learned", "ptq_mse")}
    assert all(len(entry["accuracy"]["values"]) == 1 for entry in results["accuracy"])


def test_all_models_that_are_compared_are_trained_as_long(tmp_path, monkeypatch):
    """Counts the epochs behind each model that is measured."""
    epochs, measured, kept = {}, {}, []
    train_model, quantize_layers = experiments.train_model, experiments.quantize_layers
    measure, deepcopy = experiments._SeedStudy.measure, experiments.copy.deepcopy

    def inherit(new, old):
        epochs[id(new)] = epochs.get(id(old), 0)
        kept.append(new)  # keeps the id from being reused by another network
        return new

    def train(model, *arguments, **options):
        epochs[id(model)] = epochs.get(id(model), 0) + options["epochs"]
        kept.append(model)
        return train_model(model, *arguments, **options)

    def count(bench, name, bits, network):
        measured[name, bits] = epochs[id(network)]
        return measure(bench, name, bits, network)

    monkeypatch.setattr(experiments, "train_model", train)
    monkeypatch.setattr(
        experiments, "quantize_layers", lambda model, *a, **k: inherit(quantize_layers(model, *a, **k), model)
    )
    fake_copy = SimpleNamespace(deepcopy=lambda model: inherit(deepcopy(model), model))
    monkeypatch.setattr(experiments, "copy", fake_copy)
    monkeypatch.setattr(experiments._SeedStudy, "measure", count)
    settings = replace(SETTINGS, epochs=3, seeds=1, timing_repetitions=0)
    run_study(Study(settings, synthetic_samples(60)), tmp_path)
    assert measured.pop(("fp32", 32)) == 3
    assert set(measured.values()) == {6} and len(measured) == 1 + 2 * 5


def test_only_the_tutorials_models_depend_on_the_batch(report):
    study, results, _ = report
    for run in results["runs"]:
        assert (run["accuracy_batch_1"] is not None) == (run["model"] == "qat_tutorial")
    data = split(digits_samples(), seed=42)
    for (name, _), network in study.weights.items():
        losses = {
            evaluate_model(network, data.test_inputs, data.test_labels, batch_size=size).loss
            for size in (1, 360)
        }
        difference = max(losses) - min(losses)
        assert difference > 1e-5 if name == "qat_tutorial" else difference < 1e-6


def test_deployed_models_are_those_that_were_trained(report):
    study, results, folder = report
    assert [(entry["model"], entry["bits"]) for entry in results["deployment"]] == [
        ("qat_learned", bits) for bits in study.settings.bits
    ]
    samples = study.test_samples
    runs = (run for run in study.runs if (run.model, run.seed) == ("qat_learned", study.settings.seed))
    accuracies = {run.bits: run.accuracy for run in runs}
    for entry in results["deployment"]:
        assert (folder / entry["file"]).stat().st_size == entry["bytes"]
        assert (entry["differing"], entry["differing_predictions"]) == (0, 0)
        assert entry["compared"] == 10 * samples
        assert entry["accuracy"] == pytest.approx(accuracies[entry["bits"]])
        onnx = entry["onnx"]
        assert (folder / onnx["file"]).stat().st_size <= onnx["bytes"]
        assert onnx["differing"] == 0 and onnx["compared"] > samples
        assert onnx["differing_predictions"] == 0
    batches = [entry["batch"] for entry in results["timing"]["forwards"]]
    assert batches == [1, 64] * len(study.settings.bits)
    deployed = qatfast.load(folder / results["deployment"][0]["file"], ThreeLayerNet(64, 128, 10))
    data = split(digits_samples(), seed=42)
    with torch.no_grad():
        trained = study.weights["qat_learned", study.settings.bits[0]].eval()(data.test_inputs)
        cases.assert_same(deployed(data.test_inputs), trained)


def test_without_the_extra_there_is_no_onnx_file(report, tmp_path, monkeypatch):
    study, _, _ = report
    monkeypatch.setattr(deployment, "find_spec", lambda package: None)
    (tmp_path / "models").mkdir()
    network = study.weights["qat_learned", 4]
    data = split(digits_samples(), seed=42)
    found = deployment.deploy("qat_learned", 4, network, network, data, tmp_path, repetitions=0)
    assert found.onnx is None and found.latencies == ()


def test_sizes_are_those_of_files_that_are_there(report):
    study, results, folder = report
    assert len(results["sizes"]) == 2 + 2 * 5
    for entry in results["sizes"]:
        assert set(entry) == {"model", "bits", "bytes", "file"}
        assert (folder / entry["file"]).stat().st_size == entry["bytes"]
    sizes = {(entry["model"], entry["bits"]): entry["bytes"] for entry in results["sizes"]}
    assert sizes["fp32_longer", 32] > sizes["ptq_mse", 4] > sizes["ptq_mse", 2] > 1000
    assert sizes["qat_learned", 2] == sizes["ptq_mse", 2]
    stored = load_quantized(folder / "models/qat_learned_4bit.pt")
    network = study.weights["qat_learned", 4]
    for name in ("fc1", "fc2", "fc3"):
        layer = network.get_submodule(name)
        assert torch.equal(stored[f"{name}.weight"], layer.weight_quantizer(layer.weight))
        assert torch.equal(stored[f"{name}.bias"], layer.bias)


def test_the_list_of_files_is_right(report):
    _, results, folder = report
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == set(results["files"])
    pngs = [name for name in found if name.endswith(".png")]
    assert len(pngs) == FIGURES
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in pngs)


def test_the_page_stands_alone(report):
    _, _, folder = report
    text = (folder / "index.html").read_text()
    tags = Page(text).tags
    assert not re.search(r"(https?:)?//[a-z]", text.replace("data:image/svg+xml;base64,", "")[:20_000])
    for tag, attributes in tags:
        assert tag not in ("script", "link", "iframe")
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "data:").startswith(("data:", "#"))
    assert "url(" not in text and "@import" not in text


def test_the_page_is_for_everyone(report):
    _, _, folder = report
    text = (folder / "index.html").read_text()
    page = Page(text)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == FIGURES
    assert all(len(image["alt"]) > 40 for image in images)
    dark = [attributes for tag, attributes in page.tags if tag == "source"]
    assert len(dark) == len(images) and all(
        "prefers-color-scheme: dark" in source["media"] for source in dark
    )
    assert all(light["src"] != source["srcset"] for light, source in zip(images, dark, strict=True))
    assert "width=device-width" in text and "prefers-color-scheme: dark" in text and 'lang="en"' in text


def test_the_page_says_what_the_results_say(report):
    _, results, folder = report
    words = " ".join(Page((folder / "index.html").read_text()).text)
    for insight in results["insights"]:
        text = insight["text"].removeprefix(f"{insight['bits']} bits: ")
        assert text[1:] in words
    for text in results["timing"]["insights"]:
        assert text in words
    mean = next(entry["accuracy"]["mean"] for entry in results["accuracy"] if entry["model"] == "fp32_longer")
    assert f"{100 * mean:.1f} ±" in words
    assert "Partial" not in words
    for limit in ("One small network", "no other device ran them"):
        assert limit in words


def test_the_verdict_comes_first_and_the_details_are_folded(report):
    _, results, folder = report
    text = (folder / "index.html").read_text()
    page = Page(text)
    headline = results["insights"][0]["text"]
    assert text.index(headline) < text.index("<nav") < text.index("<table") < text.index("<details")
    targets = {attributes.get("id") for tag, attributes in page.tags if tag == "section"}
    links = [attributes["href"][1:] for tag, attributes in page.tags if tag == "a"]
    assert set(links) == targets and len(links) == len(targets) >= 4
    details = [attributes for tag, attributes in page.tags if tag == "details"]
    assert len(details) >= 7 and not any("open" in attributes for attributes in details)
    # Only the accuracies, their differences and the deployed models are not folded.
    folded = text.index("<details")
    assert text[:folded].count("<img") == 1 and text[:folded].count("<table") == 3


def test_labels_are_short_and_bits_have_one_order(report):
    _, _, folder = report
    assert all(len(title) <= 18 and "," not in title for title in TITLES.values())
    text = (folder / "index.html").read_text()
    for head in re.findall(r"<thead>(.*?)</thead>", text):
        found = [int(bits) for bits in re.findall(r">(\d+) bits<", head)]
        assert found == sorted(found, reverse=True)
    captions = re.findall(r"<figcaption>(\d+) bits", text)
    assert captions == ["4", "2"] * 2


@pytest.mark.parametrize("bits", [9, 8, 3])
@pytest.mark.parametrize("name", ["ptq_mse", "qat_learned"])
def test_the_code_to_paste_makes_the_measured_network(bits, name):
    network, inputs = ThreeLayerNet(), torch.randn(50, 10)
    expected = quantize_layers(network, bits, inputs, name=name)
    names = {"model": network, "inputs": inputs}
    exec(config_code(bits, name), names)
    for layer in ("fc1", "fc2", "fc3"):
        pasted, measured = names["model"].get_submodule(layer), expected.get_submodule(layer)
        assert isinstance(pasted, qatfast.QATLinear) and pasted.config == measured.config
    expected_state = expected.state_dict()
    assert all(torch.equal(value, expected_state[key]) for key, value in names["model"].state_dict().items())
    x = torch.randn(5, 10)
    assert torch.equal(names["model"].eval()(x), expected.eval()(x))
    assert ("train the model on" in config_code(bits, name)) == (name == "qat_learned")


def test_the_code_in_the_page_is_that_of_the_verdict(tmp_path):
    study = Study(replace(SETTINGS, seeds=7), digits_samples(), train_samples=1437, test_samples=360)
    for seed in range(42, 49):
        for model, bits, accuracy in (
            ("fp32_longer", 32, 0.95),
            ("ptq_mse", 4, 0.9),
            ("qat_learned", 4, 0.95),
            ("ptq_mse", 2, 0.5),
            ("qat_learned", 2, 0.7),
        ):
            study.runs.append(Run(seed, model, bits, 0.1, accuracy))
    write_report(study, [quantize_signal(4)], tmp_path, seconds=1.0)
    results = json.loads((tmp_path / "results.json").read_text())
    code = config_code(4, "qat_learned")
    assert results["verdict"] == {"bits": 4, "model": "qat_learned", "code": code}
    words = " ".join(Page((tmp_path / "index.html").read_text()).text)
    assert code in words and "The config at 4 bits, the lowest without a loss" in words


def test_the_same_seed_gives_the_same_results(tmp_path):
    settings = replace(SETTINGS, bits=(3,), seeds=1, timing_repetitions=0)
    _, results = run(tmp_path / "report", settings, synthetic_samples(400))
    study = Study(settings, synthetic_samples(400))
    run_study(study, tmp_path)
    again = as_json(study, [quantize_signal(bits) for bits in settings.bits], seconds=2.0)
    assert again.keys() == results.keys() - {"files"}
    for name in again.keys() - set(NOT_REPRODUCED):
        assert json.dumps(again[name]) == json.dumps(results[name])


def test_times_stand_only_under_timing(report):
    _, results, _ = report
    steps = results["timing"]["steps"]
    assert [entry["model"] for entry in steps] == ["fp32", "tutorial", "qatfast"] * 2
    assert all(entry["seconds"] > 0 and entry["quartiles"][0] <= entry["quartiles"][1] for entry in steps)
    assert [entry["ratio"] for entry in steps if entry["model"] == "fp32"] == [1, 1]
    rest = {name: value for name, value in results.items() if name != "timing"}
    rest["settings"] = {}
    assert "seconds" not in json.dumps(rest)


def test_names_in_the_users_data_are_text_not_html(tmp_path):
    samples = replace(synthetic_samples(60), name="<b>x</b>.csv", class_names=("<script>", "a&b"))
    settings = replace(SETTINGS, bits=(3,), seeds=1, timing_repetitions=0)
    run(tmp_path / "report", settings, samples)
    text = (tmp_path / "report/index.html").read_text()
    assert "<b>" not in text and "<script>" not in text and "&lt;script&gt;" in text


class Stop(Exception):
    pass


@pytest.mark.parametrize("trainings", [0, 1, 4])
def test_an_interrupted_study_reports_what_it_has(tmp_path, trainings):
    settings = replace(SETTINGS, bits=(4,))
    names = []

    def on_training(name):
        if len(names) == trainings:
            raise Stop
        names.append(name)
        return lambda epoch: None

    study = Study(settings, digits_samples())
    with pytest.raises(Stop):
        run_study(study, tmp_path, on_training)
    write_report(study, [quantize_signal(4)], tmp_path, seconds=1.0)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["complete"] is False and (results["runs"] == []) == (trainings == 0)
    words = " ".join(Page((tmp_path / "index.html").read_text()).text)
    assert "Partial report" in words and f"{min(trainings, 1)} of 2 seeds" in words


def test_trainings_are_counted(tmp_path):
    names = []

    def on_training(name):
        names.append(name)
        return lambda epoch: None

    settings = replace(SETTINGS, seeds=1, timing_repetitions=0)
    run_study(Study(settings, synthetic_samples(60)), tmp_path, on_training)
    assert len(names) == count_trainings(settings) == 8
    assert names[:3] == ["FP32 start, seed 42", "FP32, seed 42", "QAT tutorial, 4 bits, seed 42"]


def write_files(folder, *names, complete=True):
    """Writes the files of a report: ``names``, and results.json, which lists them."""
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("old")
    content = {"program": "qatfast compare", "complete": complete, "files": [*names, "results.json"]}
    (folder / "results.json").write_text(json.dumps(content))


def finish(out, *, complete=True):
    with ReportFolder(out) as folder:
        (folder.path / "index.html").write_text("new")
        return folder.finish(complete=complete)


def nothing_left(tmp_path, *expected):
    return sorted(path.name for path in tmp_path.iterdir()) == sorted(expected)


def test_a_report_takes_the_place_of_an_earlier_one_or_of_nothing(tmp_path):
    out = tmp_path / "deep" / "report"
    assert finish(out) == out and (out / "index.html").read_text() == "new"
    assert out.stat().st_mode & 0o777 == (tmp_path / "deep").stat().st_mode & 0o777
    write_files(tmp_path / "other", "index.html", "models/fp32.pt")
    finish(tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["index.html"]
    (tmp_path / "empty").mkdir()
    finish(tmp_path / "empty")
    assert nothing_left(tmp_path, "deep", "other", "empty") and nothing_left(tmp_path / "deep", "report")


def test_a_complete_report_survives_a_partial_one(tmp_path):
    write_files(tmp_path / "report", "index.html")
    assert finish(tmp_path / "report", complete=False) == tmp_path / "report-partial"
    assert (tmp_path / "report/index.html").read_text() == "old"
    write_files(tmp_path / "half", "index.html", complete=False)
    assert finish(tmp_path / "half", complete=False) == tmp_path / "half"
    assert nothing_left(tmp_path, "report", "report-partial", "half")


@pytest.mark.parametrize("name", ["notes.txt", "models/mine.pt", ".git"])
def test_other_files_are_not_changed(tmp_path, name):
    write_files(tmp_path / "report", "index.html", "models/fp32.pt")
    (tmp_path / "report" / name).write_text("mine")
    with pytest.raises(FolderError, match=f"not a report's \\({re.escape(name)}\\)"):
        ReportFolder(tmp_path / "report")
    assert (tmp_path / "report" / name).read_text() == "mine" and nothing_left(tmp_path, "report")


def test_files_written_in_the_meantime_are_not_changed(tmp_path):
    with pytest.raises(FolderError), ReportFolder(tmp_path / "report") as folder:
        (tmp_path / "report").mkdir()
        (tmp_path / "report/notes.txt").write_text("mine")
        folder.finish(complete=True)
    assert (tmp_path / "report/notes.txt").read_text() == "mine" and nothing_left(tmp_path, "report")


@pytest.mark.parametrize("content", ["{}", "no json", '["files"]', '{"program": "qatfast compare"}'])
def test_results_json_of_another_program_is_not_replaced(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(FolderError, match=r"results\.json"):
        ReportFolder(tmp_path)


def test_folders_that_cannot_be_a_report(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match="is a file"):
        ReportFolder(tmp_path / "file")
    with pytest.raises(FolderError, match="cannot be written"):
        ReportFolder(tmp_path / "file" / "report")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for folder in (".", "..", "/"):
        with pytest.raises(FolderError, match="current folder or holds it"):
            ReportFolder(folder)


def test_an_error_leaves_the_earlier_report(tmp_path):
    write_files(tmp_path / "report", "index.html")
    with pytest.raises(Stop), ReportFolder(tmp_path / "report"):
        raise Stop
    assert (tmp_path / "report/index.html").read_text() == "old" and nothing_left(tmp_path, "report")
