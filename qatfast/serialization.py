"""save and load: an integer model in a safetensors file."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import arguments
from . import config as configs
from .checks import dtype_name
from .config import QATConfig, QuantSpec
from .convert import convert
from .integer import INTEGER_LAYERS, IntegerLayer, IntegerMultiheadAttention, Requantization
from .integer.base import BUFFERS, is_converted
from .model import _replace_in
from .modules import FakeQuantize

FORMAT = "qatfast"
FORMAT_VERSION = 1
_CLASSES: dict[str, Any] = {cls.__name__: cls for cls in INTEGER_LAYERS.values()}
_GRANULARITIES = ("PerTensor", "PerChannel", "PerGroup", "PerToken")
_RANGES = ("Dynamic", "MovingAverage", "MinMax", "Learned", "Fixed")
_FLOATS = {dtype_name(t): t for t in (torch.float32, torch.float64, torch.float16, torch.bfloat16)}
# What nn.Identity stands for in a file: itself, or a folded BatchNorm.
_REPLACED_BY_IDENTITY = (nn.Identity, nn.modules.batchnorm._BatchNorm)


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a deployed model to a safetensors file.

    The file holds the ``state_dict`` of the integer model, tensors that several layers share once, and in its metadata,
    as JSON, which layers are integer layers, their configs, the version of qatfast and a checksum. :func:`load` reads
    it; nothing in it is executed.

    Args:
        model: the result of :func:`qatfast.convert`, or a prepared model, which is converted first.
        path: a file, which is replaced if it exists.

    Raises:
        TypeError: ``model`` is neither; its ``state_dict`` holds something else than tensors.
        RuntimeError: a range has not been observed.

    Example:
        >>> import tempfile
        >>> from qatfast import QATConfig, prepare
        >>> model = prepare(nn.Sequential(nn.Linear(8, 4)), QATConfig.dynamic())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(model, f"{folder}/model.safetensors")
        ...     loaded = load(f"{folder}/model.safetensors", nn.Sequential(nn.Linear(8, 4)))
        >>> x = torch.randn(2, 8)
        >>> torch.equal(loaded(x), model.eval()(x))
        True
    """
    arguments.module("save", "model", model)
    if not is_converted(model):
        model = convert(model)
    tensors, shared = _tensors(model)
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "qatfast_version": _version(),
        "model": json.dumps(_description(model, shared), separators=(",", ":")),
    }
    metadata["sha256"] = _digest(metadata, tensors)
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata)
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Makes a float model the deployed model of a file.

    The layers that are integer layers in the file are replaced in place, folded BatchNorm becomes nn.Identity, and the
    parameters and buffers of all others are loaded. If ``load`` raises, ``model`` is unchanged.

    Args:
        path: a file that :func:`save` wrote.
        model: freshly built, as the one that was prepared: the same layers and dtypes. It may be on the device
            ``"meta"``.

    Returns:
        ``model`` in evaluation mode, or the new layer if ``model`` itself is a layer to replace. It gives the results
        of the model that was saved, to the bit.

    Raises:
        FileNotFoundError: there is no file.
        TypeError: ``model`` is not an nn.Module.
        ValueError: the file is damaged, of another program or of a later version, or ``model`` is another model.
    """
    arguments.module("load", "model", model)
    description, tensors = _read(path)
    builder = _Builder(model, description, tensors)
    replacements = builder.replacements()
    inverse = {new: old for old, new in replacements.items()}
    root = _replaced(model, replacements)
    try:
        rest = builder.rest(root)
    except BaseException:
        _replaced(root, inverse)
        raise
    root.load_state_dict(rest, strict=False, assign=any(p.is_meta for p in root.parameters()))
    return root.eval()


def _version() -> str:
    from . import __version__

    return __version__


def umask() -> int:
    """Returns the permissions that new files do not get; those that tempfile makes have fewer."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _is_integer(module: nn.Module) -> bool:
    return isinstance(module, (IntegerLayer, IntegerMultiheadAttention))


# Writing


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of the model, each once, and for the other names of a tensor the one that it has."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"save: expected a state_dict of tensors, got {name!r}, which is a {type(value).__name__}"
            )
        key = (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device)
        if value.numel() and key in seen:
            shared[name] = seen[key]
            continue
        seen[key] = name
        tensors[name] = value.detach().cpu().contiguous().clone()
    return tensors, shared


def _description(model: nn.Module, shared: dict[str, str]) -> dict[str, Any]:
    table: list[QATConfig] = []
    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        if not _is_integer(module):
            continue
        if module.config not in table:
            table.append(module.config)
        layers[name] = _layer(module) | {"config": table.index(module.config)}
    identities = [name for name, module in model.named_modules() if type(module) is nn.Identity]
    return {
        "configs": [_config(entry) for entry in table],
        "layers": layers,
        "identities": identities,
        "shared": shared,
    }


def _layer(module: Any) -> dict[str, Any]:
    record = {"class": type(module).__name__, "arguments": module.arguments}
    if isinstance(module, IntegerMultiheadAttention):
        quantizers = {
            name: _spec(child.spec)
            for name, child in module.named_children()
            if isinstance(child, FakeQuantize)
        }
        attention = None if module.attention is None else _spec(module.attention)
        return record | {"attention": attention, "is_packed": module.is_packed, "quantizers": quantizers}
    record["dtype"] = dtype_name(module.dtype)
    requantization = module.requantization
    if requantization is not None:
        record["requantization"] = [
            _spec(requantization.spec),
            requantization.activation,
            requantization.is_read,
        ]
    return record


def _config(config: QATConfig) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name in ("input", "weight", "bias", "output"):
        value = getattr(config, name)
        result[name] = value if value is None or isinstance(value, str) else _spec(value)
    return result


def _spec(spec: QuantSpec) -> list[Any]:
    return [
        spec.num_bits,
        spec.symmetric,
        _dataclass(spec.granularity),
        _dataclass(spec.range),
        spec.narrow_range,
    ]


def _dataclass(value: Any) -> list[Any]:
    return [type(value).__name__, *(getattr(value, field.name) for field in fields(value) if field.init)]


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Returns the checksum of a file's contents."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# Reading


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the description and the tensors of a file, whose checksum is right."""

    def error(text: str) -> ValueError:
        return ValueError(f"load: expected a file that qatfast.save wrote, got {os.fspath(path)!r}, {text}")

    if not Path(path).exists():
        raise FileNotFoundError(
            f"load: expected path to be a file, got {os.fspath(path)!r}, which does not exist"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise error("which another program wrote")
            if metadata.get("format_version") != str(FORMAT_VERSION):
                raise error(
                    f"which has the format version {metadata.get('format_version')!r}; this qatfast reads "
                    f"{FORMAT_VERSION}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError) as cause:
        raise error(f"which is damaged or no safetensors file ({cause})") from None
    if metadata.pop("sha256", None) != _digest(metadata, tensors):
        raise error("which is damaged: its contents do not have the checksum that was written")
    try:
        return json.loads(metadata["model"]), tensors
    except (KeyError, ValueError, RecursionError) as cause:
        raise error(f"whose description is no JSON ({cause})") from None


class _Builder:
    """Builds the modules that a file describes for a model."""

    def __init__(self, model: nn.Module, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.model, self.description, self.tensors = model, description, tensors
        self.used: set[str] = set()
        self.prefixes_of_keys: set[str] = set()  # of projections that may have no grid of their own
        self.names = {name: module for name, module in model.named_modules()}

    def replacements(self) -> dict[nn.Module, nn.Module]:
        try:
            return dict(self._replacements())
        except (KeyError, TypeError, AttributeError, IndexError) as cause:
            raise ValueError(
                f"load: expected the description that qatfast.save writes, got another ({cause!r})"
            ) from None

    def _replacements(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        layers = self.description["layers"]
        parts = {
            name
            for prefix, record in layers.items()
            if record["class"] == IntegerMultiheadAttention.__name__
            for name in layers
            if name.startswith(f"{prefix}." if prefix else "") and name != prefix
        }
        for name, record in layers.items():
            if name not in parts:
                yield self._module(name, record), self._layer(name, record)
        for name in self.description["identities"]:
            module = self._named(name)
            if not isinstance(module, _REPLACED_BY_IDENTITY):
                raise ValueError(
                    f"load: expected {name!r} to be a BatchNorm or Identity, as in the file, got "
                    f"{type(module).__name__}"
                )
            if type(module) is not nn.Identity:
                yield module, nn.Identity()

    def rest(self, root: nn.Module) -> dict[str, Tensor]:
        """Returns the tensors of all other modules; they are those of ``root``, which has the new modules."""
        shared = self.description["shared"]
        given = {name: self._stored(name) for name in (*self.tensors, *shared) if name not in self.used}
        wanted = {name: value for name, value in root.state_dict().items() if name not in self.used}
        for names, what in (
            (wanted.keys() - given.keys(), "missing"),
            (given.keys() - wanted.keys(), "too many"),
        ):
            if names:
                listed = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
                raise ValueError(
                    f"load: expected the model that was saved, got one of which the file has {what}: {listed}"
                )
        for name, value in wanted.items():
            stored = given[name]
            if not isinstance(value, Tensor) or (value.shape, value.dtype) != (stored.shape, stored.dtype):
                raise ValueError(
                    f"load: expected {name!r} to be {dtype_name(stored.dtype)} of shape {tuple(stored.shape)}, as in "
                    f"the file, got {_kind(value)}"
                )
        return given

    def _stored(self, name: str) -> Tensor:
        return self.tensors[self.description["shared"].get(name, name)]

    def _named(self, name: str) -> nn.Module:
        if name not in self.names:
            raise ValueError(
                f"load: expected a model with the module {name!r}, as in the file, got a {type(self.model).__name__} "
                "without it"
            )
        return self.names[name]

    def _module(self, name: str, record: dict[str, Any]) -> nn.Module:
        """Returns the module of the model that an integer layer replaces."""
        module, cls = self._named(name), _CLASSES[record["class"]]
        expected = cls._source._float_class
        if not isinstance(module, expected):
            raise ValueError(
                f"load: expected {name!r} to be an nn.{expected.__name__}, as in the file, got {type(module).__name__}"
            )
        actual = cls._source._arguments(module)
        for key, value in record["arguments"].items():
            if _tupled(value) != actual[key]:
                raise ValueError(
                    f"load: expected {name!r} to have {key}={_tupled(value)}, as in the file, got {actual[key]}"
                )
        dtype = next(module.parameters()).dtype
        if record.get("dtype", dtype_name(dtype)) != dtype_name(dtype):
            raise ValueError(
                f"load: expected {name!r} to be {record['dtype']}, as in the file, got {dtype_name(dtype)}; call "
                f"model.to(torch.{record['dtype']}) first"
            )
        return module

    def _layer(self, name: str, record: dict[str, Any]) -> Any:
        cls = _CLASSES[record["class"]]
        device = next(iter(self._named_parent(name).parameters())).device
        config = _read_config(self.description["configs"][record["config"]])
        arguments = {key: _tupled(value) for key, value in record["arguments"].items()}
        prefix = f"{name}." if name else ""
        if cls is IntegerMultiheadAttention:
            layers = self.description["layers"]
            names = [f"{part}_proj" for part in ("q", "k", "v", "out")]
            self.prefixes_of_keys |= {f"{prefix}k_proj.", f"{prefix}v_proj."}
            modules = {part: self._layer(prefix + part, layers[prefix + part]) for part in names}
            for part, spec in record["quantizers"].items():
                modules[part] = _quantizer(_read_spec(spec), device)
            attention = None if record["attention"] is None else _read_spec(record["attention"])
            buffers = self._buffers(prefix, ("bias_k", "bias_v"), device)
            return cls(arguments, config, attention, record["is_packed"], modules, buffers)
        requantization = None
        if "requantization" in record:
            spec, activation, is_read = record["requantization"]
            requantization = Requantization(_read_spec(spec), activation, is_read)
        buffers = self._buffers(prefix, BUFFERS, device)
        layer = cls(arguments, config, _FLOATS[record["dtype"]], requantization, buffers)
        layer.check_buffers(name, has_input=prefix not in self.prefixes_of_keys)
        return layer

    def _named_parent(self, name: str) -> nn.Module:
        """Returns the module of this name; a projection of attention has none of its own."""
        while name not in self.names:
            name = name.rpartition(".")[0]
        return self.names[name]

    def _buffers(self, prefix: str, names: tuple[str, ...], device: torch.device) -> dict[str, Tensor]:
        """Returns the buffers of a layer; one that several layers share is one tensor."""
        device = torch.device("cpu") if device.type == "meta" else device
        shared, result = self.description["shared"], {}
        for name in names:
            key = prefix + name
            source = shared.get(key, key)
            if source in self.tensors:
                if self.tensors[source].device != device:
                    self.tensors[source] = self.tensors[source].to(device)
                self.used.add(key)
                result[name] = self.tensors[source]
        return result


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{dtype_name(value.dtype)} of shape {tuple(value.shape)}"


def _replaced(root: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replaces modules wherever they are in ``root``; returns the root."""
    for module in list(root.modules()):
        _replace_in(module, replacements)
    return replacements.get(root, root)


def _quantizer(spec: QuantSpec, device: torch.device) -> FakeQuantize:
    device = torch.device("cpu") if device.type == "meta" else device
    quantizer = FakeQuantize(**spec.arguments, range=spec.range, device=device).requires_grad_(False).eval()
    quantizer.frozen = True
    return quantizer


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def _read_config(entry: dict[str, Any]) -> QATConfig:
    specs = {name: _read_spec(value) if isinstance(value, list) else value for name, value in entry.items()}
    return QATConfig(**specs)


def _read_spec(entry: list[Any]) -> QuantSpec:
    num_bits, symmetric, granularity, range, narrow_range = entry
    return QuantSpec(
        num_bits,
        symmetric,
        _read_dataclass(granularity, _GRANULARITIES),
        _read_dataclass(range, _RANGES),
        narrow_range,
    )


def _read_dataclass(entry: list[Any], names: tuple[str, ...]) -> Any:
    name, *values = entry
    if name not in names:
        raise KeyError(name)
    return getattr(configs, name)(*values)
