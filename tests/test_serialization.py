"""save and load: a deployed model in a safetensors file."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from qatfast import IntegerLinear, QATConfig, QATLinear, convert, load, prepare, save
from qatfast.serialization import _digest
from test_convert import CONFIGS, MODELS, Recurrent, cnn, mlp, trained


def saved(path, build=mlp, config=None, **kwargs):
    torch.manual_seed(0)
    model, x = build()
    model = trained(model, x, config, **kwargs)
    save(model, path)
    return model, x


@pytest.mark.filterwarnings("ignore:prepare")
@pytest.mark.parametrize("with_flow", [True, False], ids=["flow", "no flow"])
@pytest.mark.parametrize("config", ["static", "static4", "tutorial16", "weight only", "output"])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_loaded_model_gives_the_same_bits(tmp_path, build, config, with_flow):
    torch.manual_seed(0)
    model, x = build()
    model = trained(model, x, CONFIGS[config], example_inputs=x if with_flow else None)
    save(model, tmp_path / "model")
    fresh = build()[0]
    loaded = load(tmp_path / "model", fresh)
    assert loaded is fresh and not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(x), model.eval()(x))
    state, converted = loaded.state_dict(), convert(model).state_dict()
    assert state.keys() == converted.keys()
    assert all(torch.equal(value, converted[name]) for name, value in state.items())


def test_an_integer_model_and_a_single_layer_are_saved(tmp_path):
    layer = QATLinear(6, 4, config=QATConfig.dynamic(), dtype=torch.float16)
    converted = convert(layer)
    save(converted, tmp_path / "layer")
    loaded = load(tmp_path / "layer", nn.Linear(6, 4, dtype=torch.float16))
    x = torch.randn(3, 6, dtype=torch.float16)
    assert isinstance(loaded, IntegerLinear) and torch.equal(loaded(x), layer(x))


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    model = prepare(Recurrent(), QATConfig.dynamic())
    save(model, tmp_path / "model")
    names = load_file(tmp_path / "model").keys()
    assert "embedding.weight" in names and "last.weight" not in names
    loaded = load(tmp_path / "model", Recurrent())
    assert loaded.last.weight is loaded.embedding.weight
    assert loaded.last.weight_scale is loaded.embedding.weight_scale


def test_a_model_without_memory_is_filled(tmp_path):
    model, x = saved(tmp_path / "model", cnn)
    with torch.device("meta"):
        empty = cnn()[0]
    assert torch.equal(load(tmp_path / "model", empty)(x), model.eval()(x))


def bytes_of(model):
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@pytest.mark.parametrize(
    "config, limit",
    [(QATConfig.static(), 0.26), (QATConfig.dynamic(), 0.26), (QATConfig.weight_only(4, 32), 0.17)],
    ids=["static", "dynamic", "weight only"],
)
@pytest.mark.parametrize("build", [
    lambda: (nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 64)), torch.ones(2, 512)),
    lambda: (nn.Sequential(nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Conv2d(128, 192, 3)), torch.ones(1, 64, 6, 6)),
], ids=["linear", "conv"])  # fmt: skip
def test_the_file_is_small(tmp_path, build, config, limit):
    model, x = build()
    size = bytes_of(model)
    assert size > 1e6
    save(trained(model, x, config, example_inputs=x, edges=None), tmp_path / "model")
    assert (tmp_path / "model").stat().st_size <= limit * size


# Files that load must not take


def unchanged(model):
    """Returns a check that ``model`` is as it is now."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]

    def check():
        assert kinds == [type(module) for module in model.modules()]
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    return check


def rewritten(path, **changes):
    """Changes the metadata of a file and gives it the right checksum."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | changes
    metadata.pop("sha256")
    save_file(tensors, path, metadata | {"sha256": _digest(metadata, tensors)})


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file(tmp_path, part):
    path = tmp_path / "model"
    saved(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ValueError, match=r"load: expected a file that qatfast\.save wrote, got .* damaged"):
        load(path, mlp()[0])


def test_a_file_with_a_flipped_bit(tmp_path):
    path = tmp_path / "model"
    saved(path)
    data = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for position in [*torch.randint(len(data), (200,), generator=generator).tolist(), len(data) - 1]:
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(ValueError, match=r"load: expected a file that qatfast\.save wrote"):
            load(path, mlp()[0])


def test_files_of_others(tmp_path):
    path = tmp_path / "model"
    for write in (
        lambda: path.write_bytes(b"PK\x03\x04 not a safetensors file" * 9),
        lambda: torch.save(mlp()[0], path),
        lambda: save_file({"weight": torch.ones(2)}, path),
        lambda: save_file({"weight": torch.ones(2)}, path, {"format": "pt"}),
    ):
        write()
        with pytest.raises(ValueError, match=r"load: expected a file that qatfast\.save wrote"):
            load(path, mlp()[0])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path / "none", mlp()[0])
    saved(path)
    rewritten(path, format_version="2")
    with pytest.raises(ValueError, match="format version '2'; this qatfast reads 1"):
        load(path, mlp()[0])


def forged(path, change):
    """Changes the description of a file."""
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["model"])
    change(description)
    rewritten(path, model=json.dumps(description))


@pytest.mark.parametrize("change, error", [
    (lambda d: d.clear(), "expected the description"),
    (lambda d: d["layers"].clear(), "too many"),
    (lambda d: d["layers"]["0"].update({"class": "os.system"}), "expected the description"),
    (lambda d: d["layers"]["0"].update(config=99), "expected the description"),
    (lambda d: d["layers"]["0"].update(dtype="float64"), "to be float64, as in the file"),
    (lambda d: d["layers"]["0"]["arguments"].update(in_features=13), "in_features=13"),
    (lambda d: d["layers"]["0"].pop("requantization"), "expected 0.bias to be none or torch.float32"),
    (lambda d: d["configs"][0]["weight"].__setitem__(0, 4), "expected 0.weight"),
    (lambda d: d["configs"][0]["weight"].__setitem__(0, 99), "num_bits"),
    (lambda d: d["configs"][0]["weight"].__setitem__(2, ["__import__", "os"]), "expected the description"),
    (lambda d: d["identities"].append("0"), "BatchNorm or Identity"),
    (lambda d: d["shared"].update({"0.weight_nan": "0.weight"}), "weight_nan"),
])  # fmt: skip
def test_a_forged_description(tmp_path, change, error):
    path = tmp_path / "model"
    torch.manual_seed(0)
    model, x = mlp()
    save(trained(model, x, example_inputs=x), path)
    forged(path, change)
    fresh = mlp()[0]
    check = unchanged(fresh)
    with pytest.raises(ValueError, match=error):
        load(path, fresh)
    check()


@pytest.mark.parametrize("other, error", [
    (lambda: nn.Sequential(nn.Linear(12, 16)), "without it"),
    (lambda: nn.Sequential(*mlp()[0], nn.LayerNorm(4)), "missing: 7.bias"),
    (lambda: nn.Sequential(nn.Linear(12, 17), *mlp()[0][1:]), "out_features=16, as in the file, got 17"),
    (lambda: nn.Sequential(nn.Identity(), *mlp()[0][1:]), "expected '0' to be an nn.Linear"),
    (lambda: nn.Sequential(mlp()[0][0], nn.BatchNorm1d(17), *mlp()[0][2:]), "1.weight"),
    (lambda: mlp()[0].half(), "to be float32, as in the file, got float16"),
])  # fmt: skip
def test_another_model(tmp_path, other, error):
    saved(tmp_path / "model")
    fresh = other()
    check = unchanged(fresh)
    with pytest.raises(ValueError, match=error):
        load(tmp_path / "model", fresh)
    check()


class Counter(nn.Module):
    def get_extra_state(self):
        return {"steps": 3}

    def forward(self, x):
        return x


def test_what_save_does_not_take(tmp_path):
    with pytest.raises(TypeError, match=r"save: expected model to be an nn\.Module"):
        save({}, tmp_path / "model")
    with pytest.raises(TypeError, match=r"call qatfast\.prepare first"):
        save(mlp()[0], tmp_path / "model")
    model = convert(nn.Sequential(QATLinear(3, 2, config=QATConfig.dynamic()), Counter()))
    with pytest.raises(TypeError, match="_extra_state"):
        save(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())
