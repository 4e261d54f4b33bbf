"""Models and training loops of other libraries, as their users have them. Weights are random and nothing is loaded."""

import copy
import importlib
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import cases
from qatfast import (
    QATConfig,
    QATLinear,
    calibrate,
    freeze,
    prepare,
    quantization_disabled,
    summary,
    unused_layers,
)

READ = "its parent reads .weight"
TRANSPOSED = "its weight is transposed; replace it by an nn.Linear first"
LABELS = torch.tensor([0, 1, 2, 3])


def load(library):
    """Imports a library or skips the test."""
    if importlib.util.find_spec("torchvision") is not None:
        load_torchvision()  # first: the others import it too
    return pytest.importorskip(library, reason=f"needs the package {library}")


def load_torchvision():
    """Imports torchvision, also where its operators for detection miss their CUDA libraries."""
    try:
        importlib.import_module("torchvision.models")
    except RuntimeError:
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)
        importlib.import_module("torchvision.models")


def images():
    return (cases.normal((4, 3, 32, 32), seed=1),)


def tokens(**more):
    ids = torch.randint(0, 64, (4, 10), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids, **more}


def of_torchvision(name, **arguments):
    return lambda library: (getattr(library.models, name)(num_classes=4, **arguments), images())


def vision_transformer(library):
    model = library.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=4)
    nn.init.normal_(model.heads.head.weight, std=0.1)  # zeros at first
    return model, images()


def swin(library):
    arguments = {"num_classes": 4, "stochastic_depth_prob": 0.0}
    return library.models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], **arguments), images()


def beit(library):
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return library.create_model("beit_base_patch16_224", num_classes=4, **arguments), images()


def bert(library):
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = library.BertConfig(vocab_size=64, num_labels=4, **sizes, **dropout)
    inputs = tokens(labels=LABELS, attention_mask=torch.ones(4, 10, dtype=torch.int64))
    return library.BertForSequenceClassification(config), inputs


def llama(library):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    config = library.LlamaConfig(vocab_size=64, num_attention_heads=4, num_key_value_heads=2, **sizes)
    return library.LlamaForCausalLM(config), tokens()


def gpt2(library):
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
    config = library.GPT2Config(vocab_size=64, bos_token_id=0, eos_token_id=0, **sizes, **dropout)
    return library.GPT2LMHeadModel(config), tokens()


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        self.embed, self.encoder, self.head = (
            nn.Embedding(64, 32),
            nn.TransformerEncoder(layer, 2),
            nn.Linear(32, 4),
        )

    def forward(self, ids):
        return self.head(self.encoder(self.embed(ids)).mean(1))


def encoder(library):
    return Encoder(), (tokens()["input_ids"],)


# The library, the model with its inputs, the number of quantized layers, why others are in float.
MODELS = {
    "resnet18": ("torchvision", of_torchvision("resnet18"), 21, []),
    "mobilenet": ("torchvision", of_torchvision("mobilenet_v3_small", dropout=0.0), 54, []),
    "efficientnet": (
        "torchvision",
        of_torchvision("efficientnet_b0", dropout=0.0, stochastic_depth_prob=0.0),
        82,
        [],
    ),
    "vit": (
        "torchvision",
        vision_transformer,
        10,
        ["has weights of its own: class_token", "has weights of its own: pos_embedding"],
    ),
    "swin": (
        "torchvision",
        swin,
        11,
        ["has weights of its own: relative_position_bias_table", READ, READ] * 4,
    ),
    "beit": (
        "timm",
        beit,
        8,
        [
            "has weights of its own: cls_token",
            *["has weights of its own: relative_position_bias_table", READ] * 2,
        ],
    ),
    "bert": ("transformers", bert, 17, []),
    "llama": ("transformers", llama, 16, []),
    "gpt2": ("transformers", gpt2, 3, [TRANSPOSED] * 8),
    "encoder": ("torch", encoder, 10, []),
}


def build(name):
    library, function, *_ = MODELS[name]
    library = load(library)
    torch.manual_seed(0)
    return function(library)


def prepared(name, config=None):
    model, inputs = build(name)
    return prepare(model, config, example_inputs=inputs), inputs


def result(model, inputs):
    """Returns the scores."""
    y = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return y if isinstance(y, torch.Tensor) else y.logits


def loss_of(model, inputs):
    if isinstance(inputs, dict):
        return model(**inputs).loss
    return nn.functional.cross_entropy(model(*inputs), LABELS)


def trained(model, inputs, steps=6):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model.train(), inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def scores(model, inputs):
    with torch.no_grad():
        return result(model.eval(), inputs)


def distance(a, b):
    return ((a.float() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_evaluates_and_loads(name):
    model, inputs = build(name)
    keys = set(model.state_dict())
    model = prepare(model, example_inputs=inputs)
    rows = summary(model).rows
    assert sum(row.reason is None for row in rows) == MODELS[name][2]
    assert sorted(row.reason for row in rows if row.reason) == sorted(MODELS[name][3])
    with unused_layers(model) as unused:
        losses = trained(model, inputs)
    assert unused == []
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    assert losses[-1] < losses[0]

    y = scores(model, inputs)
    cases.assert_same(result(model, inputs).detach(), y)
    cases.assert_same(scores(copy.deepcopy(model), inputs), y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(loss_of(copy.deepcopy(model).train(), inputs))

    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert keys <= set(state)
    other, _ = prepared(name)
    other.load_state_dict(state)
    cases.assert_same(scores(other, inputs), y)
    frozen = freeze(copy.deepcopy(model), batch_norm=True).train()
    loss_of(frozen, inputs).backward()
    for key, value in frozen.state_dict().items():
        cases.assert_same(value, state[key])


@pytest.mark.parametrize("name", MODELS)
def test_a_calibrated_model_is_close_to_the_float_model(name):
    model, inputs = prepared(name)
    with torch.no_grad(), calibrate(model):
        result(model, inputs)
    y = scores(model, inputs)
    with quantization_disabled(model):
        expected = scores(model, inputs)
    assert 0 < distance(y, expected) < 0.1


def test_layers_whose_weight_is_read_are_found_without_a_recorded_forward():
    model, inputs = build("swin")
    with unused_layers(prepare(model)) as unused:
        result(model, inputs)
    recorded, _ = prepared("swin")
    assert unused == [row.name for row in summary(recorded).rows if row.reason == READ]


@pytest.mark.parametrize("name", ["resnet18", "beit", "llama"])
def test_activation_checkpointing_changes_nothing(name):
    model, inputs = prepared(name)
    trained(model, inputs, steps=2)
    model.zero_grad()
    other = copy.deepcopy(model)
    expected = loss_of(model.train(), inputs)
    expected.backward()
    if name == "llama":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it has another name in Transformers 5
            other.gradient_checkpointing_enable()
        actual = loss_of(other.train(), inputs)
    elif name == "beit":
        other.set_grad_checkpointing()
        actual = loss_of(other.train(), inputs)
    else:
        y = checkpoint(other.train(), *inputs, use_reentrant=False)
        actual = nn.functional.cross_entropy(y, LABELS)
    actual.backward()
    cases.assert_same(actual, expected)
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        if theirs.grad is not None:
            cases.assert_same(ours.grad, theirs.grad)
    for (key, ours), theirs in zip(other.named_buffers(), model.buffers(), strict=True):
        if "quantizer" in key:  # BatchNorm itself moves twice
            cases.assert_same(ours, theirs)


def test_a_compiled_model_is_one_graph_with_the_same_results(fresh_compiler):
    model, inputs = prepared("llama")
    trained(model, inputs, steps=1)
    model.zero_grad()
    other = copy.deepcopy(model)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    expected, actual = loss_of(model.train(), inputs), loss_of(compiled.train(), inputs)
    expected.backward()
    actual.backward()
    cases.assert_same(actual, expected)
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        cases.assert_same(ours.grad, theirs.grad)
    for ours, theirs in zip(other.buffers(), model.buffers(), strict=True):
        cases.assert_same(ours, theirs)


# PEFT


def with_adapters(peft, model):
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))


def test_adapters_on_a_prepared_model(tmp_path):
    peft = load("peft")
    base, inputs = prepared("llama")
    with torch.no_grad(), calibrate(base):
        result(base, inputs)
    freeze(base)  # so that the adapter's checkpoint has all that changes
    state = {key: value.clone() for key, value in base.state_dict().items()}
    model = with_adapters(peft, base)
    losses = trained(model, inputs)
    assert losses[-1] < losses[0]
    y = scores(model, inputs)
    model.save_pretrained(tmp_path)
    other, _ = prepared("llama")
    other.load_state_dict(state)
    other = peft.PeftModel.from_pretrained(other, tmp_path)
    cases.assert_same(scores(other, inputs), y)
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj) is QATLinear
    assert distance(scores(merged, inputs), y) < 0.1


def test_a_model_with_adapters_is_prepared():
    peft = load("peft")
    model, inputs = build("llama")
    model = with_adapters(peft, model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    prepare(model, layers={"*lora_*": None}, example_inputs=inputs)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    floats = {row.name for row in summary(model).rows if row.reason}
    assert floats == {name.removesuffix(".weight") for name in trainable}
    losses = trained(model, inputs)
    assert losses[-1] < losses[0]


# Training loops


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        ids = torch.randint(0, 64, (10,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("config", [QATConfig.static(), QATConfig.static(4)], ids=["observed", "learned"])
def test_the_trainer_goes_on_from_a_checkpoint(config, tmp_path):
    transformers = load("transformers")
    load("accelerate")
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )

    def run(**kwargs):
        model, _ = prepared("llama", config)
        transformers.Trainer(model, arguments, train_dataset=Sentences()).train(**kwargs)
        return model

    whole = run()
    for (key, ours), theirs in zip(
        run(resume_from_checkpoint=str(tmp_path / "checkpoint-2")).state_dict().items(),
        whole.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(ours, theirs), key


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_goes_on_from_a_checkpoint(precision, tmp_path):
    lightning = load("lightning")

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, _ = prepared("encoder")

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    ids = torch.randint(0, 64, (16, 10), generator=torch.Generator().manual_seed(2))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids, ids[:, 0] % 4), 8)

    def run(epochs, **kwargs):
        task = Task()
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            precision=precision,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
            **quiet,
        )
        trainer.fit(task, data, **kwargs)
        return task, trainer

    _, trainer = run(1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed, whole = run(2, ckpt_path=tmp_path / "one.ckpt")[0], run(2)[0]
    for ours, theirs in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True):
        cases.assert_same(ours, theirs)
