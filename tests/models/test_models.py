"""Models by name: the same layout as everybody's, normalisation inside, every image counted."""

import os
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import torch

from backdoorlab import models
from backdoorlab.data import Split, batches
from backdoorlab.errors import UserError
from backdoorlab.features import extract, maps_of, predictions
from backdoorlab.metrics import Evaluator, predict
from backdoorlab.models import PASSES, Classifier
from backdoorlab.poison import no_poison
from backdoorlab.run import Run

CPU = torch.device("cpu")
OWN = [("preactresnet18", 4), ("preactresnet10", 4), ("fastnet", 8)]
TIMM = ["resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_100"]


def build(
    name: str,
    width: int | None = None,
    channels: int = 3,
    num_classes: int = 10,
    image_size: int = 32,
) -> Classifier:
    torch.manual_seed(0)
    mean, std = [0.4, 0.5, 0.6][:channels], [0.2, 0.25, 0.3][:channels]
    return models.build(
        name,
        num_classes=num_classes,
        in_chans=channels,
        mean=mean,
        std=std,
        width=width,
        image_size=image_size,
    )


def images(n: int = 4, channels: int = 3, size: int = 32) -> torch.Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(1))


def expected_names() -> set[str]:
    """The state dict of the field's PreAct-ResNet18, spelled out."""
    batch_norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {"conv1.weight", "linear.weight", "linear.bias"}
    for layer in range(1, 5):
        for block in range(2):
            start = f"layer{layer}.{block}"
            names |= {f"{start}.bn{i}.{entry}" for i in (1, 2) for entry in batch_norm} | {
                f"{start}.conv{i}.weight" for i in (1, 2)
            }
        if layer > 1:
            names.add(f"layer{layer}.0.shortcut.0.weight")
    return names


def test_preactresnet18_has_the_layout_that_benchmarks_share() -> None:
    model = build("preactresnet18")
    state = model.network.state_dict()
    assert len(state) == 102
    assert set(state) == expected_names()
    assert sum(p.numel() for p in model.parameters()) == 11_171_146
    assert tuple(state["linear.weight"].shape) == (10, 512)
    assert sum(p.numel() for p in build("preactresnet10").parameters()) < 6e6


def test_width_scales_every_stage() -> None:
    model = build("preactresnet18", 16)
    assert [
        model.network.get_submodule(f"layer{i}")(x).shape[1]
        for i, x in ((1, torch.rand(1, 16, 8, 8)),)
    ] == [16]
    assert tuple(model.network.linear.weight.shape) == (10, 128)
    assert [info["num_chs"] for info in model.network.feature_info] == [16, 32, 64, 128]


@pytest.mark.parametrize(("name", "width"), [*OWN, *((name, None) for name in TIMM)])
def test_head_of_features_is_the_model(name: str, width: int | None) -> None:
    model = build(name, width).eval()
    x = images()
    with torch.no_grad():
        logits = model(x)
        assert logits.shape == (4, 10) and torch.isfinite(logits).all()
        assert torch.allclose(model.forward_head(model.forward_features(x)), logits, atol=1e-6)
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        assert pooled.dim() == 2
        assert torch.allclose(model.get_classifier()(pooled), logits, atol=1e-5), (
            "the classifier is linear in what it sees"
        )
    assert not torch.allclose(logits[0], logits[1]), "different images have different logits"


@pytest.mark.parametrize(("name", "width"), [*OWN, *((name, None) for name in TIMM)])
def test_features_of_a_whole_split(name: str, width: int | None, tmp_path: Path) -> None:
    model = build(name, width)
    split = Split((images(6) * 255).byte(), torch.arange(6))
    features = extract(model, split, Run(tmp_path, seed=0, device=CPU, precision="fp32"))
    assert not model.training
    with torch.no_grad():
        assert torch.allclose(features.logits, model(split.images.float() / 255), atol=1e-4)
        assert torch.allclose(model.get_classifier()(features.pooled), features.logits, atol=1e-4)
    assert (
        features.early.shape[0] == 6
        and features.early.shape[1] % 2 == 0
        and torch.isfinite(features.early).all()
    )
    channels, numbers = features.early.shape[1] // 2, features.spatial.shape[1]
    assert (
        features.spatial.shape[0] == 6
        and numbers % channels == 0
        and (numbers <= 1024 or numbers == channels)
    )
    assert (features.early.std(0) > 0).any(), "early features differ between images"
    assert not [m for m in model.modules() if m._forward_hooks], "the hook is removed"


def test_maps_with_channels_last_are_known_by_their_number() -> None:
    for shape in ((2, 5, 3, 8), (2, 3, 3, 8)):
        assert maps_of(torch.zeros(shape), 8).shape == (2, 8, *shape[1:3])
    assert maps_of(torch.zeros(2, 8, 5, 3), 8).shape == (2, 8, 5, 3), "a control"


def test_a_stage_that_gives_no_single_tensor_is_one_line(tmp_path: Path) -> None:
    class Pair(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x

    model, pair = build("preactresnet10", 4), Pair()
    forward = model.forward_features
    model.stages = lambda: [pair, torch.nn.Identity()]  # type: ignore[method-assign]
    model.forward_features = lambda x: forward(pair(x)[0])  # type: ignore[method-assign]
    split = Split((images(6) * 255).byte(), torch.arange(6))
    with pytest.raises(UserError, match=r"its last but one stage \(Pair\) gives no single tensor"):
        extract(model, split, Run(tmp_path, seed=0, device=CPU, precision="fp32"))
    assert not pair._forward_hooks


@pytest.mark.parametrize("name", TIMM)
def test_small_images_keep_some_positions(name: str) -> None:
    model = build(name).eval()
    with torch.no_grad():
        features = model.forward_features(images(1))
    assert features[0].numel() // features.shape[1] > 1 or features.dim() == 3


@pytest.mark.parametrize("name", ["preactresnet10", "resnet18"])
def test_grey_images(name: str) -> None:
    width = 4 if name in models.OWN else None
    assert build(name, width, channels=1)(images(2, 1)).shape == (2, 10)


def test_normalisation_is_inside_so_perturbations_live_in_pixel_space() -> None:
    model = build("preactresnet10", 4).eval()
    x = images()
    with torch.no_grad():
        by_hand = model.network(
            (x - torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
            / torch.tensor([0.2, 0.25, 0.3]).view(1, 3, 1, 1)
        )
        assert torch.allclose(model(x), by_hand, atol=1e-6)
        assert not torch.allclose(model(x), model.network(x), atol=1e-3), (
            "the bare network wants normalised images"
        )
    x.requires_grad_()
    inside = torch.autograd.grad(model(x).sum(), x)[0]
    z = ((x - model.mean) / model.std).detach().requires_grad_()
    outside = torch.autograd.grad(model.network(z).sum(), z)[0]
    assert torch.allclose(inside, outside / model.std, rtol=1e-4, atol=1e-6), (
        "a step of 1/255 is one grey level in every channel"
    )


def test_normalisation_is_not_trained_and_is_saved() -> None:
    model = build("preactresnet10", 4)
    assert {"mean", "std"} <= set(model.state_dict())
    assert not {"mean", "std"} & {name for name, _ in model.named_parameters()}


def test_the_seed_decides_the_initial_weights() -> None:
    first, second = build("preactresnet10", 4), build("preactresnet10", 4)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    torch.manual_seed(1)
    third = models.build(
        "preactresnet10", num_classes=10, in_chans=3, mean=[0.5] * 3, std=[0.2] * 3, width=4
    )
    assert any(
        not torch.equal(a, b) for a, b in zip(first.parameters(), third.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("preactresnet81", "preactresnet18"), ("resnet81", "resnet"), ("vgg19bn", "vgg19")],
)
def test_a_wrong_name_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"unknown model {name!r}.* Did you mean '{nearest}"):
        build(name)


def test_width_is_refused_for_networks_that_have_none() -> None:
    with pytest.raises(UserError, match="leave --width out"):
        build("resnet18", 16)


@pytest.mark.parametrize("width", [0, -4])
def test_a_width_that_is_no_width_is_refused(width: int) -> None:
    with pytest.raises(UserError, match="width"):
        build("preactresnet10", width)


def test_every_image_is_counted_forward_and_backward() -> None:
    model = build("preactresnet10", 4)
    start = (PASSES.forward, PASSES.backward)
    loss = model(images(5)).sum()
    assert (PASSES.forward - start[0], PASSES.backward - start[1]) == (5, 0)
    loss.backward()
    assert (PASSES.forward - start[0], PASSES.backward - start[1]) == (5, 5)
    with torch.no_grad():
        model(images(3))
    assert (PASSES.forward - start[0], PASSES.backward - start[1]) == (8, 5)
    x = images(2).requires_grad_()
    torch.autograd.grad(model(x).sum(), x)
    assert (PASSES.forward - start[0], PASSES.backward - start[1]) == (10, 7), (
        "attacks on the image count too"
    )


def test_evaluation_is_not_counted() -> None:
    model = build("preactresnet10", 4)
    start = (PASSES.forward, PASSES.backward)
    split = Split((images(7) * 255).byte(), torch.arange(7))
    assert len(predict(model, split, CPU)) == 7
    assert (PASSES.forward, PASSES.backward) == start and not PASSES.paused


def test_every_model_names_its_stages() -> None:
    model = build("preactresnet18", 4)
    assert model.stages() == [
        model.network.layer1,
        model.network.layer2,
        model.network.layer3,
        model.network.layer4,
    ]
    for name in TIMM:
        assert len(build(name).stages()) >= 3


@pytest.fixture
def refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every network refuse a batch of no image, as those do that reshape by batch."""
    forward = Classifier.forward_features

    def reshaping(model: Classifier, x: torch.Tensor) -> torch.Tensor:
        return forward(model, x.reshape(len(x), -1).reshape(x.shape))

    monkeypatch.setattr(Classifier, "forward_features", reshaping)
    with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
        build("preactresnet10", 4)(images(0))


@pytest.mark.usefixtures("refuses_nothing")
def test_an_empty_split_is_never_asked_of_a_network(tmp_path: Path) -> None:
    model, run = build("preactresnet10", 4), Run(tmp_path, seed=0, device=CPU, precision="fp32")
    some = Split((images(3) * 255).byte(), torch.arange(3))
    none = some.subset(torch.zeros(0, dtype=torch.int64))
    assert not list(batches(none, 8, device=CPU)) and len(list(batches(some, 8, device=CPU))) == 1
    for found in (predict(model, none, CPU), predictions(model, none, run)):
        assert found.shape == (0,) and found.dtype == torch.int64
    features = extract(model, none, run)
    assert [len(rows) for rows in features] == [0] * 5 and not model.training
    scores = Evaluator(some, no_poison(some), 10, CPU)(model)
    assert scores.asr is None and scores.robust_accuracy is None and scores.clean_accuracy >= 0


@pytest.mark.usefixtures("refuses_nothing")
def test_a_clean_training_is_scored_at_its_end(tmp_path: Path) -> None:
    record = helpers.attack("none", "clean", tmp_path, *helpers.TINY)
    assert record.info["scores"]["asr"] is None and record.info["scores"]["clean_accuracy"] > 0


NARROW = """
import torch
from backdoorlab.models.preact_resnet import PreActBlock

torch.set_num_threads(2)
for channels in (1, 4, 8, 12, 16, 20):
    torch.manual_seed(0)
    block = PreActBlock(channels, 2 * channels, 2).to(memory_format=torch.channels_last).eval()
    exact = PreActBlock(channels, 2 * channels, 2).double().eval()
    exact.load_state_dict(block.state_dict())
    for _ in range(8):
        x = torch.randn(153, channels, 32, 32).contiguous(memory_format=torch.channels_last)
        for net, seen in ((block, x), (exact, x.double())):
            net.zero_grad()
            seen = seen.clone().requires_grad_()
            net(seen).square().mean().backward()
        for a, b in zip(block.parameters(), exact.parameters()):
            assert (a.grad - b.grad).abs().max() <= 1e-3 * b.grad.abs().max(), channels
"""


def test_narrow_networks_train_rightly_on_several_threads() -> None:
    """A strided 1x1 convolution of few channels gives wrong gradients or crashes (oneDNN#6035),
    hence a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", NARROW],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, f"{done.returncode} {done.stderr[-500:]}"
