"""Times a training step of whole models: in float, prepared by qatfast, and as other packages quantize them.

python benchmarks/models.py            rewrites models.md beside this file; minutes
python benchmarks/models.py --seconds 5 --only resnet
"""

import argparse
import copy
import os
import statistics
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy, relu
from torch.profiler import ProfilerActivity, profile

import qatfast
from qatfast import QATConfig
from qatfast.bench.layers import _quiet
from qatfast.bench.machine import PEERS, machine, versions
from qatfast.bench.results import spread
from qatfast.bench.runner import _without_error_stream
from qatfast.bench.timer import time_in_turns, turn_of

HERE = Path(__file__).parent


class Block(nn.Module):
    """The block of ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(relu(self.norm1(self.conv1(x)))))
        return relu(y + self.shortcut(x))


def resnet18() -> nn.Module:
    """Returns the ResNet-18 of He et al. 2016 (arXiv 1512.03385) in channels-last format."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    sizes = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    blocks = [block for i, o, stride in sizes for block in (Block(i, o, stride), Block(o, o, 1))]
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))
    return model.to(memory_format=torch.channels_last)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(relu(self.up(self.norm(x))))


class Attention(nn.Module):
    """Of linear layers, which every package quantizes."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).flatten(2))


def encoder(width: int = 512, layers: int = 6) -> nn.Module:
    """Returns a transformer encoder with a linear layer for 1000 classes after its first token."""
    blocks = [block for _ in range(layers) for block in (Attention(width, 8), FeedForward(width))]
    return nn.Sequential(*blocks, nn.LayerNorm(width), _First(), nn.Linear(width, 1000))


class _First(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0]


class Subject(NamedTuple):
    title: str
    model: Callable[[], nn.Module]
    input: Callable[[], torch.Tensor]
    limit: float  # of qatfast, as a share of the float model's time


SUBJECTS = {
    "resnet": Subject(
        "ResNet-18, 16 images of 64x64",
        resnet18,
        lambda: torch.randn(16, 3, 64, 64).to(memory_format=torch.channels_last),
        1.0,
    ),
    "encoder": Subject(
        "transformer encoder, 6 layers of width 512, 16 sequences of 128 tokens",
        encoder,
        lambda: torch.randn(16, 128, 512),
        0.95,
    ),
}


def _qatfast(model: nn.Module, x: torch.Tensor) -> nn.Module:
    return qatfast.prepare(model, example_inputs=x)


def _qatfast_dynamic(model: nn.Module, x: torch.Tensor) -> nn.Module:
    return qatfast.prepare(model, QATConfig.dynamic(), example_inputs=x)


def _torch_ao(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """FX graph mode: input per tensor, weight per output channel, BatchNorm folded in training."""
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    return prepare_qat_fx(model.train(), get_default_qat_qconfig_mapping("x86"), (x,))


def _torchao(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Linear layers only: input per token, weight per output channel."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat import QATConfig as Config

    config = Config(
        activation_config=IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
        weight_config=IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True),
        step="prepare",
    )
    quantize_(model, config)
    if not any("FakeQuantized" in type(module).__name__ for module in model.modules()):
        raise NotImplementedError("it quantizes no layer")
    return model


class _Whole(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


def _nncf(model: nn.Module, x: torch.Tensor) -> nn.Module:
    os.environ.setdefault("NNCF_CI", "1")  # no telemetry
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters

    return nncf.quantize(
        _Whole(model),  # nncf adds a child, which nn.Sequential would call
        nncf.Dataset([x]),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=1,
        advanced_parameters=AdvancedQuantizationParameters(disable_bias_correction=True),
    )


def _brevitas(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Input affine per tensor with a learned range, weight per output channel."""
    from brevitas import nn as layers
    from brevitas import quant

    options = {
        "weight_quant": quant.Int8WeightPerChannelFloat,
        "input_quant": quant.ShiftedUint8ActPerTensorFloat.let(collect_stats_steps=1),
    }
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                new = layers.QuantLinear(
                    child.in_features, child.out_features, bias=child.bias is not None, **options
                )
            elif type(child) is nn.Conv2d:
                arguments = (child.in_channels, child.out_channels, child.kernel_size)
                rest = {"stride": child.stride, "padding": child.padding, "bias": child.bias is not None}
                new = layers.QuantConv2d(*arguments, **rest, **options)
            else:
                continue
            new.weight, new.bias = child.weight, child.bias
            setattr(module, name, new)
    return model


PROVIDERS = {
    "float32": lambda model, x: model,
    "qatfast, static()": _qatfast,
    "qatfast, dynamic()": _qatfast_dynamic,
    "torch.ao prepare_qat_fx": _torch_ao,
    "torchao QATConfig, linear layers only": _torchao,
    "NNCF quantize": _nncf,
    "Brevitas": _brevitas,
}


def training_step(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """Returns a function that runs forward, backward and a step of SGD that changes nothing."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model.train()

    def step() -> None:
        cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak(step: Callable[[], None]) -> int:
    """Returns the largest number of bytes that a step has allocated at a time, beyond the model."""
    with (
        _without_error_stream(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


class Row(NamedTuple):
    provider: str
    seconds: float
    ratio: tuple[float, float, float]
    peak: int


def measure(subject: Subject, seconds: float) -> tuple[list[Row], dict[str, str]]:
    """Returns the figures of all providers, and why others are missing."""
    torch.manual_seed(0)
    model, x = subject.model(), subject.input()
    labels = torch.arange(len(x)) % 1000
    steps, skipped = {}, {}
    for name, provider in PROVIDERS.items():
        try:
            with _quiet():
                step = training_step(provider(copy.deepcopy(model), x), x, labels)
                for _ in range(2):  # ranges are set, and packages that wait some steps are ready
                    step()
            steps[name] = step
        except Exception as error:
            if name == "float32" or name.startswith("qatfast"):
                raise
            skipped[name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    with _quiet():
        peaks = {name: peak(step) for name, step in steps.items()}
    times = time_in_turns(
        {name: turn_of(step, "cpu") for name, step in steps.items()}, seconds=seconds, min_rounds=5
    )
    base = times["float32"]
    rows = []
    for name, values in times.items():
        ratio = spread([value / other for value, other in zip(values, base, strict=True)])
        rows.append(Row(name, statistics.median(values), (ratio.median, ratio.low, ratio.high), peaks[name]))
    return rows, skipped


def report(seconds: float, only: list[str]) -> str:
    facts = {**machine(), **versions(*PEERS), "date": date.today().isoformat()}
    lines = [
        "# Whole models",
        "",
        "Written by `python benchmarks/models.py`. A training step is forward, backward and SGD. All models of a table",
        "run in turns in one process; ratios are medians over the rounds, with quartiles. The peak is the largest",
        "number of bytes that a step has allocated at a time, gradients included.",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
    ]
    for key in only:
        subject = SUBJECTS[key]
        print(subject.title, file=sys.stderr, flush=True)
        rows, skipped = measure(subject, seconds)
        base = rows[0]
        lines += [
            "",
            f"## {subject.title}",
            "",
            "| model | step | of float32 (quartiles) | peak | of float32 |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for row in rows:
            ratio = "{:.2f} ({:.2f} to {:.2f})".format(*row.ratio)
            share = f"{row.peak / base.peak:.2f}"
            lines.append(
                f"| {row.provider} | {row.seconds * 1e3:.0f} ms | {ratio} | {row.peak / 2**20:.0f} MiB | {share} |"
            )
        lines += [
            "",
            f"Target of `qatfast, static()`: at most {subject.limit:.2f} of the time, 1.00 of the peak.",
        ]
        lines += [line for name, why in skipped.items() for line in ("", f"Without {name}: {why}")]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="time for the rounds of a table (default: 20)"
    )
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--out", type=Path, default=HERE / "models.md")
    options = parser.parse_args()
    text = report(options.seconds, options.only)
    options.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
