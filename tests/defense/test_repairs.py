"""Repairs by pruning and fine-tuning: their closed forms by hand, and a kill changes nothing."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab import engine, models
from backdoorlab.data import Augment, Split
from backdoorlab.errors import UserError
from backdoorlab.models import Classifier
from backdoorlab.record import DefenderView
from backdoorlab.repair import inserted_layer, masked_triggers, pruning
from backdoorlab.run import Run
from backdoorlab.settings import methods
from backdoorlab.storage import reading

CPU = torch.device("cpu")
METHOD: dict[str, Any] = {
    name: methods.load("defense", name).module
    for name in (
        *("anp", "bnp", "bti_dbf", "clp", "ep", "fp", "fst", "ft_sam", "nad", "nc", "npd", "rnp"),
    )
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 18) -> Split:
    """Grey 8x8 images of three classes."""
    pixels = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator())
    return Split(pixels, torch.arange(count) % 3)


def network(architecture: str = "preactresnet10", width: int | None = 2) -> Classifier:
    """A network whose batch normalisations are no identities."""
    torch.manual_seed(0)
    model = models.build(
        architecture,
        num_classes=3,
        in_chans=1,
        mean=[0.5],
        std=[0.5],
        width=width,
        image_size=8,
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                for tensor in (module.weight, module.running_var):
                    tensor.uniform_(0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    tensor.uniform_(-0.5, 0.5)
    return model


def view_of(model: Classifier, trusted: Split) -> DefenderView:
    return DefenderView(
        architecture="toy",
        num_classes=3,
        image_shape=(1, 8, 8),
        class_names=("a", "b", "c"),
        augment=Augment(1),
        granted={"model": model, "trusted": trusted, "train": trusted},
    )


# --- pruning


def test_masks_are_factors_of_scales_and_noise_is_relative() -> None:
    """gamma (m + n) and beta (1 + n_b), and the weights get no gradient."""
    model, split = network().eval(), images()
    masks = pruning.Masks(model)
    noise, by_hand = [], network().eval()
    x = split.images.float() / 255
    assert torch.equal(pruning.masked(model, masks, x), model(x)), "all are 1 at first"
    with torch.no_grad():
        for i, (factor, norm) in enumerate(
            zip(masks.factors, pruning.batch_norms(by_hand).values(), strict=True)
        ):
            factor.uniform_(0, 1)
            noise.append([torch.rand(len(factor), generator=generator(k)) for k in (i, 50 + i)])
            norm.weight.mul_(factor + noise[-1][0])
            norm.bias.mul_(1 + noise[-1][1])
    found = pruning.masked(model, masks, x, [n for n, _ in noise], [b for _, b in noise])
    torch.testing.assert_close(found, by_hand(x))
    found.sum().backward()
    assert all(factor.grad is not None for factor in masks.factors)
    assert all(norm.weight.grad is None for norm in pruning.batch_norms(model).values())


def test_pruned_channels_lose_their_scale_and_keep_their_bias() -> None:
    model, before = network(), network()
    masks = pruning.Masks(model)
    name, old = masks.norms[2], pruning.batch_norms(before)[masks.norms[2]]
    with torch.no_grad():
        masks.factors[2].copy_(torch.tensor([0.2, 0.3] * (len(old.weight) // 2)))
    marked = masks.up_to(0.2)
    assert pruning.prune(model, marked) == len(old.weight) // 2
    new = pruning.batch_norms(model)[name]
    assert torch.equal(new.weight, old.weight * (masks.factors[2] > 0.2))
    assert torch.equal(new.bias, old.bias) and new.bias[0] != 0
    pruning.prune(model, marked, biases=True)
    assert new.bias[0] == 0 and torch.equal(new.bias[1], old.bias[1])


def test_pruning_stops_before_the_first_step_that_costs_too_much() -> None:
    accuracies = [0.9, 0.9, 0.85, 0.7, 0.9]
    asked: list[int] = []

    def accuracy(step: int) -> float:
        asked.append(step)
        return accuracies[step]

    assert pruning.furthest(4, accuracy, 0.1) == 2 and asked == [0, 1, 2, 3], "not one further"
    assert pruning.furthest(4, accuracy, 0.5) == 4
    assert pruning.furthest(4, accuracy, 0.0) == 1
    assert pruning.furthest(0, accuracy, 0.1) == 0


def test_a_threshold_is_the_highest_that_trusted_images_allow(tmp_path: Path) -> None:
    """The model is pruned anew at each threshold, and the channel that is needed stays."""

    class Needed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            # Class 1 by the last channel alone; the others say nothing.
            seen: Tensor = self.norm(x.expand(-1, 4, -1, -1)).mean((2, 3))
            return torch.stack([torch.full_like(seen[:, 3], 0.5), seen[:, 3]], 1)

    labels = torch.arange(10) % 2
    split = Split((labels * 255).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2), labels)
    model = Needed().eval()
    masks = pruning.Masks(model)
    with torch.no_grad():
        masks.factors[0].copy_(torch.tensor([0.0, 0.12, 0.95, 0.42]))
    run = Run(tmp_path, seed=0, device=CPU)
    pruning.prune_by_masks(model, masks, 0.1, 0.05, split, run)
    assert (model.norm.weight == 0).tolist() == [True, True, False, False]
    assert run.notes == ["2 of 4 channels are pruned, up to a mask of 0.40"]
    pruning.prune_by_masks(model, masks, 0.1, 0.6, split, run)
    assert model.norm.weight[3] == 0, "a control"


def test_a_channel_is_above_by_standard_deviations() -> None:
    values = torch.tensor([1.0] * 15 + [9.0])
    assert pruning.above(values, 3.0).tolist() == [False] * 15 + [True]
    assert not pruning.above(values, 3.76).any(), "of sixteen none is further away"
    assert pruning.above(torch.ones(1), 0.0).tolist() == [False]


@pytest.mark.parametrize("name", ["anp", "bnp", "clp", "ep", "npd", "rnp"])
def test_a_network_without_batch_normalisation_is_one_line(name: str, tmp_path: Path) -> None:
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), [0.5], [0.5])
    module, run = METHOD[name], Run(tmp_path, seed=0, device=CPU)
    with pytest.raises(UserError, match=r"needs a network with batch normalisation, and .*ft$"):
        module.defend(view_of(model, images()), module.Config(), run)


@pytest.mark.parametrize("name", ["fp", "fst"])
def test_a_last_layer_that_is_not_linear_is_one_line(name: str, tmp_path: Path) -> None:
    model = network()
    model.network.linear = nn.Sequential(model.network.linear)
    module, run = METHOD[name], Run(tmp_path, seed=0, device=CPU)
    with pytest.raises(UserError, match=r"linear last layer, and .* ends in Sequential"):
        module.defend(view_of(model, images()), module.Config(), run)


# --- CLP


def test_a_channels_bound_is_its_kernels_largest_singular_value() -> None:
    convolution, norm = nn.Conv2d(5, 7, 3), nn.BatchNorm2d(7, eps=0.1)
    assert norm.running_var is not None
    with torch.no_grad():
        norm.weight.uniform_(-1, 1)
        norm.running_var.uniform_(0, 2)
    found = METHOD["clp"].lipschitz(convolution, norm)
    for k in range(7):
        values = np.linalg.svd(convolution.weight[k].detach().numpy().reshape(5, 9))[1]
        scale = abs(norm.weight[k].item()) / math.sqrt(norm.running_var[k].item() + 0.1)
        assert found[k].item() == pytest.approx(values[0] * scale, rel=1e-5)


@pytest.mark.parametrize(
    ("architecture", "width", "expected"),
    [
        # A later bn1 normalises a sum; the first follows the stem's convolution.
        (
            "preactresnet10",
            2,
            {"layer1.0.bn1": "conv1"}
            | {f"layer{i}.0.bn2": f"layer{i}.0.conv1" for i in range(1, 5)},
        ),
        # A group's first maps are pooled in between.
        ("fastnet", 2, {f"group{i}.bn2": f"group{i}.conv2" for i in (1, 2, 3)}),
    ],
)
def test_a_normalisation_is_paired_with_the_convolution_that_it_follows(
    architecture: str, width: int, expected: dict[str, str]
) -> None:
    model = network(architecture, width)
    pairs = METHOD["clp"].paired(model, torch.zeros(1, 1, 8, 8))
    found = {
        name.removeprefix("network."): next(
            other.removeprefix("network.")
            for other, module in model.named_modules()
            if module is convolution
        )
        for name, convolution in pairs.items()
    }
    # Maps of one pixel are not pooled, and then enter as they are.
    found = {name: conv for name, conv in found.items() if name in expected or "bn2" in name}
    assert found == expected


def test_clp_prunes_the_channel_with_the_large_bound(tmp_path: Path) -> None:
    model = network(width=16)
    norm = model.network.layer1[0].bn2
    with torch.no_grad():
        norm.weight[5] = 100
    pruned = METHOD["clp"].defend(
        view_of(model, images()), METHOD["clp"].Config(), Run(tmp_path, seed=0, device=CPU)
    )
    after = pruned.network.layer1[0].bn2
    assert after.weight[5] == 0 == after.bias[5] and (after.weight != 0).sum() == 15


# --- BNP


def test_the_divergence_is_that_of_two_gaussians() -> None:
    mean, other_mean = torch.tensor([0.3, -1.0]), torch.tensor([0.1, 2.0])
    variance, other = torch.tensor([0.5, 2.0]), torch.tensor([1.5, 0.7])
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(
        normal(mean, variance.sqrt()), normal(other_mean, other.sqrt())
    )
    torch.testing.assert_close(
        METHOD["bnp"].divergence(mean, variance, other_mean, other), expected
    )


def test_moments_are_those_of_all_trusted_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backdoorlab import data

    real = data.batches
    monkeypatch.setattr(data, "batches", lambda split, _size, **rest: real(split, 5, **rest))
    model, split = network().eval(), images()
    found = METHOD["bnp"].moments(model, split, Run(tmp_path, seed=0, device=CPU))
    entering = model.network.conv1((split.images.float() / 255 - 0.5) / 0.5)
    mean, variance = found["network.layer1.0.bn1"]
    torch.testing.assert_close(mean, entering.mean((0, 2, 3)))
    torch.testing.assert_close(variance, entering.var((0, 2, 3), correction=0))


# --- EP


def test_the_entropy_is_that_of_each_channels_histogram() -> None:
    """Against numpy's histogram of the standardised channel, over the range of all channels."""
    peaks = torch.randn(200, 3, generator=generator()) * torch.tensor([1.0, 5.0, 0.1]) + 7
    found = METHOD["ep"].entropies(peaks, 0.25)
    values = ((peaks - peaks.mean(0)) / peaks.std(0)).double().numpy()
    edges = np.arange(values.min(), values.max() + 0.25, 0.25)
    for channel in range(3):
        share = np.histogram(values[:, channel], edges)[0] / 200
        share = share[share > 0]
        assert found[channel].item() == pytest.approx(-(share * np.log(share)).sum(), abs=0.02)
    twice = METHOD["ep"].entropies(torch.tensor([[0.0], [0.0], [1.0], [1.0]]), 0.01)
    assert twice.item() == pytest.approx(math.log(2))


def stamped_corners(count: int) -> Split:
    """400 images of dim noise; the first `count` of them have a white corner."""
    pixels = torch.randint(0, 100, (400, 1, 8, 8), dtype=torch.uint8, generator=generator(3))
    pixels[:count, :, 5:, 5:] = 255
    return Split(pixels, torch.arange(400) % 3)


@pytest.mark.parametrize(("stamped", "pruned"), [(80, True), (0, False)])
def test_ep_prunes_the_channel_that_answers_to_the_trigger(
    stamped: int, pruned: bool, tmp_path: Path
) -> None:
    """A control: without poison the same channel has one kind of values, and stays."""
    ep, model = METHOD["ep"], network(width=16)
    with torch.no_grad():
        # A channel that is bright where nine neighbours are, among channels of small noise.
        model.network.conv1.weight[:] = 0.0
        model.network.conv1.weight[:, :, 1, 1] = 1.0
        model.network.conv1.weight[:, :, 0, 0] = torch.linspace(-2, -0.5, 16)[:, None]
        model.network.conv1.weight[5] = 1.0
    found = ep.defend(
        view_of(model, stamped_corners(stamped)), ep.Config(), Run(tmp_path, seed=0, device=CPU)
    )
    assert (found.network.layer1[0].bn1.weight[5] == 0) == pruned
    assert (found.network.layer1[0].bn1.weight != 0).sum() == 16 - pruned


def test_ep_leaves_a_channel_out_that_is_the_same_for_all_images(tmp_path: Path) -> None:
    ep, model = METHOD["ep"], network(width=16)
    with torch.no_grad():
        model.network.conv1.weight[5] = 0.0
    found = ep.defend(
        view_of(model, stamped_corners(0)), ep.Config(), Run(tmp_path, seed=0, device=CPU)
    )
    assert found.network.layer1[0].bn1.weight[5] != 0


# --- NC


class Corner(nn.Module):
    """Classes 0 to 3 by the brightest band of two rows; a white corner makes it class 1."""

    def forward(self, x: Tensor) -> Tensor:
        bands: Tensor = 20 * x.view(-1, 4, 16).mean(2)
        corner = 40 * (x[:, 0, 6:, 6:].mean((1, 2)) - 0.6).relu()
        return bands + corner[:, None] * torch.tensor([0.0, 1.0, 0.0, 0.0])


def bands(count: int = 40) -> Split:
    """Images that `Corner` sees as their class."""
    labels = torch.arange(count) % 4
    pixels = torch.randint(0, 60, (count, 1, 8, 8), dtype=torch.uint8, generator=generator())
    for i, label in enumerate(labels.tolist()):
        pixels[i, :, 2 * label : 2 * label + 2] += 100
    return Split(pixels, labels)


def test_the_smallest_mask_is_that_of_the_trigger(tmp_path: Path) -> None:
    """Other classes need a band of sixteen pixels, and the attacked one a corner of four."""
    config = masked_triggers.SearchConfig(search_epochs=150)
    run = Run(tmp_path, seed=0, device=CPU)
    masks, patterns = masked_triggers.recover_masks(Corner(), bands(), 4, config, run)
    sizes = masked_triggers.size(masks)
    assert sizes.argmin() == 1 and sizes[1] < 5 and sizes[[0, 2, 3]].min() > 6
    assert masks[1, 0, 6:, 6:].sum() > 0.9 * sizes[1]
    split = bands()
    x = torch.lerp(split.images.float() / 255, patterns[1], masks[1])
    assert (Corner()(x).argmax(1) == 1).float().mean() > 0.95
    assert (Corner()(split.images.float() / 255).argmax(1) == split.labels).all(), "a control"


class Zero(nn.Module):
    """A model that answers with class 0 whatever it sees."""

    def forward(self, x: Tensor) -> Tensor:
        return 50 * torch.eye(4)[[0] * len(x)] + 0 * x.mean()


def test_a_mask_that_never_works_is_the_whole_image_and_not_flagged(tmp_path: Path) -> None:
    run = Run(tmp_path, seed=0, device=CPU)
    config = masked_triggers.SearchConfig(search_epochs=6)
    masks, _ = masked_triggers.recover_masks(Zero(), bands(), 4, config, run)
    sizes = masked_triggers.size(masks)
    assert sizes[1:].tolist() == [64.0] * 3 and sizes[0] < 64
    assert METHOD["nc"].outliers(sizes, 2.0)[1].tolist() == [True, False, False, False]


def test_the_weight_of_the_size_rises_while_a_trigger_works_and_falls_while_not() -> None:
    search = masked_triggers.Search(3, (1, 2, 2))
    config = masked_triggers.SearchConfig(patience=2, size_weight=0.5, size_factor=4.0)
    rates = [[1.0, 0.0, 1.0]] * 5 + [[0.5, 0.0, 1.0]] * 2
    seen = []
    for rate in rates:
        search.judge(torch.tensor(rate), config)
        seen.append(search.weights.tolist())
    assert [row[0] for row in seen] == pytest.approx([0, 0.5, 0.5, 2, 2, 2, 0.25])
    assert [row[1] for row in seen] == [0] * 7
    assert [row[2] for row in seen] == pytest.approx([0, 0.5, 0.5, 2, 2, 8, 8])


def test_small_masks_are_outliers_and_large_ones_are_not() -> None:
    """By hand: median 10, median deviation 1."""
    sizes = torch.tensor([9.0, 11.0, 10.0, 9.0, 2.0, 30.0, 10.5])
    indices, flagged = METHOD["nc"].outliers(sizes, 2.0)
    assert indices[4].item() == pytest.approx(8 / 1.4826) and indices[5] > 2
    assert flagged.tolist() == [False] * 4 + [True] + [False] * 2
    assert not METHOD["nc"].outliers(sizes, 6.0)[1].any(), "a control"
    # Two sizes lie equally far from their median.
    assert not METHOD["nc"].outliers(torch.tensor([1.0, 100.0]), 2.0)[1].any()


@pytest.mark.parametrize("stamped", [0.2, 1.0, 0.0])
def test_a_share_of_the_images_gets_the_flagged_trigger(
    stamped: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nc, model = METHOD["nc"], network()
    masks, patterns = torch.full((3, 1, 8, 8), 0.9), torch.zeros(3, 1, 8, 8)
    masks[1], patterns[1, :, :2] = 0.0, 0.5
    masks[1, :, :2, :2] = 1.0
    monkeypatch.setattr(nc, "recover_masks", lambda *_: (masks, patterns))
    changed: list[Tensor] = []

    def shown(model: nn.Module, *_: Any, change: Callable[[Tensor], Tensor]) -> nn.Module:
        changed.append(change(torch.ones(2000, 1, 8, 8)))
        return model

    monkeypatch.setattr(nc, "finetune", shown)
    run = Run(tmp_path, seed=0, device=CPU)
    nc.defend(view_of(model, images()), nc.Config(stamped=stamped), run)
    hit = (changed[0] != 1).flatten(1).any(1)
    assert hit.float().mean().item() == pytest.approx(stamped, abs=0.03)
    assert (changed[0][hit][:, :, :2, :2] == 0.5).all(), "the trigger of class 1, and no other"
    assert (changed[0].sum((1, 2, 3)) == 64 - 2.0 * hit).all()


def test_nc_returns_the_model_where_no_class_stands_out(tmp_path: Path) -> None:
    nc, model = METHOD["nc"], network(width=4)
    flags = dict(search_epochs=2, works=0, epochs=2, batch_size=9)
    found = {}
    for index in (1e9, 0.0):
        folder = tmp_path / str(index)
        folder.mkdir()
        config = nc.Config(index=index, **flags)
        run = Run(folder, seed=0, device=CPU)
        found[index] = nc.defend(view_of(network(width=4), images()), config, run).state_dict()
    same = {
        index: all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        for index, state in found.items()
    }
    assert same == {1e9: True, 0.0: False}, "the second is a control"


# --- NPD


@pytest.mark.parametrize(
    ("architecture", "place"),
    [("preactresnet18", "layer4.1.conv1"), ("preactresnet10", "layer4.0.conv1")],
)
def test_the_layer_stands_before_the_last_convolution_that_is_normalised(
    architecture: str, place: str
) -> None:
    """Of PreAct-ResNet18 it is the published place."""
    model = network(architecture)
    convolution, norm = inserted_layer.place(model, torch.zeros(1, 1, 8, 8))
    block = model.network.get_submodule(place.removesuffix(".conv1"))
    assert convolution is block.conv1 and norm is block.bn2


def randomised(layer: inserted_layer.Layer) -> None:
    """Make a layer anything but the identity."""
    assert layer.norm.running_mean is not None and layer.norm.running_var is not None
    with torch.no_grad():
        layer.mix.weight.add_(0.3 * torch.randn(layer.mix.weight.shape, generator=generator(1)))
        for tensor in (layer.norm.weight, layer.norm.running_var):
            tensor.copy_(torch.rand(tensor.shape, generator=generator(2)) + 0.5)
        for tensor in (layer.norm.bias, layer.norm.running_mean):
            tensor.copy_(torch.randn(tensor.shape, generator=generator(3)))


@pytest.mark.parametrize("architecture", ["preactresnet10", "preactresnet18", "fastnet"])
def test_a_folded_layer_answers_as_the_layer_did(architecture: str, tmp_path: Path) -> None:
    run, split = Run(tmp_path, seed=0, device=CPU), images()
    model, x = network(architecture, 4).eval(), split.images.float() / 255
    original = model(x)
    convolution, norm = inserted_layer.place(model, x[:1])
    padding = convolution.padding
    with inserted_layer.inserted(model, convolution, split, run) as extended:
        begun = extended.eval()(x)
        randomised(extended.layer)
        answered = extended.eval()(x)
    torch.testing.assert_close(begun, original, rtol=1e-4, atol=1e-5)
    assert (answered - original).abs().max() > 0.01, "a control: the layer does something"
    assert convolution.padding == padding and torch.equal(model(x), original), "taken out again"
    inserted_layer.fold(extended.layer, convolution, norm)
    torch.testing.assert_close(model(x), answered, rtol=1e-4, atol=1e-5)


def test_the_fold_needs_the_padding_to_pass_the_layer(tmp_path: Path) -> None:
    """Control: of a layer that sees no padding, the fold is wrong at the border, and only there."""
    layer = inserted_layer.Layer(3).eval()
    randomised(layer)
    convolution, norm = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5).eval()
    x = torch.randn(2, 3, 6, 6, generator=generator())
    bare = nn.Conv2d(3, 5, 3)
    bare.load_state_dict(convolution.state_dict())
    through = norm(bare(layer(F.pad(x, [1] * 4))))
    beside = norm(convolution(layer(x)))
    inserted_layer.fold(layer, convolution, norm)
    folded = norm(convolution(x))
    torch.testing.assert_close(folded, through, rtol=1e-4, atol=1e-5)
    wrong = (folded - beside).abs().amax((0, 1)) > 1e-4
    assert not wrong[1:-1, 1:-1].any() and wrong[0].all() and wrong[:, -1].all()


def test_the_layer_is_the_identity_in_training_mode_too(tmp_path: Path) -> None:
    run, split = Run(tmp_path, seed=0, device=CPU), images()
    model, x = network(width=4).eval(), split.images.float() / 255
    convolution, _ = inserted_layer.place(model, x[:1])
    original = model(x)
    with inserted_layer.inserted(model, convolution, split, run) as extended:
        extended.layer.train()
        trained = extended(x)
        extended.layer.norm.reset_parameters()
        fresh = extended(x)
    # The running variance is the unbiased one, and so not quite the batch's.
    apart, control = ((out - original).abs().max() for out in (trained, fresh))
    assert apart < 0.1 * control, "a control: a fresh normalisation is none"


def test_npds_images_move_to_the_second_class_and_stay_in_the_ball(tmp_path: Path) -> None:
    npd, run, split = METHOD["npd"], Run(tmp_path, seed=0, device=CPU), images()
    model, x = network(width=4).eval(), split.images.float() / 255
    std, config = torch.full((1, 1, 1, 1), 0.5), METHOD["npd"].Config(radius=1.0, fooled=1.0)
    seen, second = npd.perturbed(model, std, x, config, run)
    before, after = (model(images).softmax(1).gather(1, second[:, None]) for images in (x, seen))
    assert torch.equal(second, model(x).argsort(1)[:, 1])
    assert after.mean() > before.mean()
    assert ((seen - x) / std).flatten(1).norm(dim=1).max() <= 1.0001
    assert seen.min() >= 0 and seen.max() <= 1
    still, _ = npd.perturbed(model, std, x, npd.Config(fooled=0.0), run)
    assert torch.equal(still, x), "a control: all are fooled enough"


def test_npd_changes_one_convolution_and_the_mean_behind_it(tmp_path: Path) -> None:
    npd, run = METHOD["npd"], Run(tmp_path, seed=0, device=CPU)
    model, before = network(width=4), network(width=4).state_dict()
    config = npd.Config(epochs=3, batch_size=9, guard_drop=None)
    after = npd.defend(view_of(model, images()), config, run).state_dict()
    changed = {name for name, value in after.items() if not torch.equal(before[name], value)}
    assert after.keys() == before.keys()
    assert changed == {
        "network.layer4.0.conv1.weight",
        "network.layer4.0.bn2.running_mean",
    }


# --- BTI-DBF


class Sums(nn.Module):
    """Features are three sums of pixels; the first two tell the class, the third misleads."""

    num_features, num_classes = 3, 2

    def forward_features(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3]

    def forward_head(self, f: Tensor, pre_logits: bool = False) -> Tensor:
        told = f[:, 0] - f[:, 1] - f[:, 2]
        return f if pre_logits else torch.stack([told, -told], 1)


def test_a_mask_keeps_the_features_that_tell_the_class(tmp_path: Path) -> None:
    bti, run = METHOD["bti_dbf"], Run(tmp_path, seed=0, device=CPU)
    labels = torch.arange(20) % 2
    pixels = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = 200 * (1 - labels), 200 * labels
    # Where the class is the first, the third feature is there and speaks for the second.
    pixels[:, 0, 0, 2] = 250 * (1 - labels)
    model = Classifier(Sums(), [0.0], [1.0])
    split, config = Split(pixels, labels), bti.Config(mask_epochs=400, mask_lr=0.05)
    kept = bti.decouple(model, split, config, run, 1).flatten()
    assert (kept[:2] > 0.9).all() and kept[2] < 0.1
    drawn = bti.decouple(model, split, bti.Config(mask_epochs=0), run, 2).flatten()
    assert ((drawn > 0.1) & (drawn < 0.9)).any(), "a control: it begins at random"


def test_a_generator_leaves_benign_features_and_moves_the_others(tmp_path: Path) -> None:
    """It finds the pixel that only the third feature reads; without leave it stays where it is."""
    bti, split = METHOD["bti_dbf"], images()
    model, m = Classifier(Sums(), [0.0], [1.0]), torch.tensor([[1.0, 1.0, 0.0]])
    moved, settings = [], dict(generator_width=4, batch_size=9, identity_epochs=150)
    for limit in (0.3, 0.0):
        config = bti.Config(**settings, invert_epochs=60, image_limit=limit, benign_weight=1.0)
        (tmp_path / str(limit)).mkdir()
        run = Run(tmp_path / str(limit), seed=0, device=CPU)
        torch.manual_seed(0)
        painter = bti.UNet(1, 1, 4)
        bti.learn_identity(painter, model, split, config, run)
        bti.invert(painter, model, m, None, split, config, run, 1)
        x = split.images.float() / 255
        with torch.no_grad():
            change = model.forward_features(bti.painted(painter, x)) - model.forward_features(x)
        moved.append(change.square().mean(0))
    assert moved[0][2] > 5 * moved[0][:2].max() and moved[0][2] > 5 * moved[1][2]


def test_bti_dbf_needs_features_of_one_tensor(tmp_path: Path) -> None:
    bti, run = METHOD["bti_dbf"], Run(tmp_path, seed=0, device=CPU)

    class Branches(Sums):
        def forward_features(self, x: Tensor) -> Any:
            return [x, x]

    view = view_of(Classifier(Branches(), [0.0], [1.0]), images())
    with pytest.raises(UserError, match=r"no single tensor \(Branches\), .* another defense$"):
        bti.defend(view, bti.Config(identity_epochs=0), run)


# --- ANP, RNP


def test_noise_ascends_by_its_signs_and_stays_in_its_bound() -> None:
    noise = [torch.tensor([0.3, -0.3, 0.1]), torch.tensor([0.0])]
    gradients = (torch.tensor([2.0, 1.0, -0.1]), torch.tensor([0.0]))
    first, second = METHOD["anp"].ascended(noise, gradients, 0.2, 0.4)
    assert first.tolist() == pytest.approx([0.4, -0.1, -0.1]) and second.tolist() == [0]


def test_anps_noise_raises_the_loss(tmp_path: Path) -> None:
    anp, model, split = METHOD["anp"], network().eval().requires_grad_(False), images()
    masks, run = pruning.Masks(model), Run(tmp_path, seed=0, device=CPU)
    batch = engine.Batch(split.images.float() / 255, split.labels, torch.arange(len(split)))

    def loss(noise: tuple[list[Tensor], list[Tensor]]) -> float:
        logits = pruning.masked(model, masks, batch.images, *noise)
        return F.cross_entropy(logits, batch.labels).item()

    drawn = anp.sensitive_noise(model, masks, batch, anp.Config(noise_steps=0), run)
    found = anp.sensitive_noise(model, masks, batch, anp.Config(noise_steps=4), run)
    assert loss(found) > loss(drawn)
    assert all(part.abs().max() <= 0.4 for part in (*found[0], *found[1]))


class Banded(nn.Module):
    """Classes 0 to 3 by the brightness of four bands of two rows. A fifth channel, silent on clean
    images, sees the corner and adds `pull` times its value to class 1."""

    def __init__(self, pull: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 8, bias=False)
        self.norm = nn.BatchNorm2d(5, momentum=None)
        self.head = nn.Linear(5, 4, bias=False)
        with torch.no_grad():
            self.conv.weight.zero_()
            for k in range(4):
                self.conv.weight[k, 0, 2 * k : 2 * k + 2] = 1 / 16
            self.conv.weight[4, 0, 6:, 6:] = 1 / 4
            self.norm.bias[4] = -3.0
            self.head.weight[:] = torch.eye(4, 5) * 10
            self.head.weight[1, 4] = pull

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.conv(x)).relu().flatten(1))
        return logits


@pytest.mark.parametrize("pull", [30.0, 0.0])
def test_anp_prunes_the_channel_that_noise_makes_answer_the_target(
    pull: float, tmp_path: Path
) -> None:
    """A control: the same channel, where nothing reads it, stays. On trained models of the digits
    ANP's effect differs from model to model (docs/lab/repairs.md), and no row promises it."""
    anp, split = METHOD["anp"], bands()
    # Weak noise in the corner of the last band, as elsewhere: nothing but the trigger is bright.
    split.images[:, :, 6:, 6:] = torch.randint(
        0, 60, (len(split), 1, 2, 2), dtype=torch.uint8, generator=generator(1)
    )
    toy = Banded(pull)
    toy(split.images.float() / 255)  # running statistics
    model: Any = toy.eval()
    stamped = split.images.float() / 255
    stamped[:, :, 6:, 6:] = 1.0

    def right(network: nn.Module, x: Tensor) -> float:
        return (network(x).argmax(1) == split.labels).float().mean().item()

    assert right(model, split.images.float() / 255) == 1
    assert (right(model, stamped) == 0.25) == bool(pull), "a working backdoor, or none"
    config = anp.Config(iterations=100, batch_size=40)
    pruned = anp.defend(view_of(model, split), config, Run(tmp_path, seed=0, device=CPU))
    assert (pruned.norm.weight == 0).tolist() == [False] * 4 + [bool(pull)]
    assert right(pruned, stamped) >= 0.9 and right(pruned, split.images.float() / 255) == 1


def test_rnp_clips_gradients_together() -> None:
    gradients = (torch.tensor([3.0, 0.0]), torch.tensor([[4.0]]))
    clipped = METHOD["rnp"].clipped(gradients, 1.0)
    assert torch.cat([part.flatten() for part in clipped]).tolist() == pytest.approx([0.6, 0, 0.8])
    assert all(
        torch.equal(a, b)
        for a, b in zip(METHOD["rnp"].clipped(gradients, 6.0), gradients, strict=True)
    )


# --- FP


def test_dormant_channels_are_small_of_either_sign() -> None:
    pooled = torch.tensor([[-9.0, 0.5, 2.0, 0.0], [-7.0, -0.5, 2.0, 0.0]])
    assert METHOD["fp"].by_size(pooled).tolist() == [3, 1, 2, 0]


def test_fp_keeps_what_it_pruned(tmp_path: Path) -> None:
    fp, run = METHOD["fp"], Run(tmp_path, seed=0, device=CPU)
    config = fp.Config(epochs=2, tolerance=0.9, guard_drop=None)
    model = fp.defend(view_of(network(), images()), config, run)
    pruned = (model.network.linear.weight == 0).all(0)
    assert f"{int(pruned.sum())} of 16 channels are pruned" in run.notes and pruned.sum() >= 8


# --- FT-SAM


def test_the_ascent_is_adaptive() -> None:
    """rho w^2 g / || |w| g ||, elementwise."""
    weights = [torch.tensor([1.0, -2.0]), torch.tensor([[3.0]])]
    gradients = [torch.tensor([0.5, 0.5]), torch.tensor([[-1.0]])]
    length = math.sqrt(0.5**2 + 1**2 + 3**2)
    first, second = METHOD["ft_sam"].ascent(weights, gradients, 2.0)
    assert first.tolist() == pytest.approx([2 * 0.5 / length, 2 * 4 * 0.5 / length])
    assert second.item() == pytest.approx(2 * 9 * -1 / length)
    assert METHOD["ft_sam"].ascent([torch.zeros(2)], [torch.zeros(2)], 2.0)[0].tolist() == [0, 0]


def test_a_step_takes_the_gradient_at_the_ascended_weights(tmp_path: Path) -> None:
    """Against the same step written out; the second pass moves no batch statistics."""
    ft_sam, run = METHOD["ft_sam"], Run(tmp_path, seed=0, device=CPU)
    config = ft_sam.Config(rho=0.5, lr=0.1, momentum=0.0, weight_decay=0.0)
    model, other, split = network().train(), network().train(), images()
    batch = engine.Batch(split.images.float() / 255, split.labels, torch.arange(len(split)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ft_sam.sharpness_aware_step(model, optimizer, model, batch, 3, config, run)

    def gradients() -> list[Tensor]:
        # The label has .9, the other two classes have .05 each.
        target = F.one_hot(batch.labels, 3) * 0.85 + 0.05
        loss = -(target * other(batch.images).log_softmax(1)).sum(1).mean()
        return list(torch.autograd.grad(loss, list(other.parameters())))

    before = [weight.detach().clone() for weight in other.parameters()]
    steps = ft_sam.ascent(before, gradients(), 0.5)
    statistics = {name: value.clone() for name, value in other.named_buffers()}
    with torch.no_grad():
        for weight, step in zip(other.parameters(), steps, strict=True):
            weight.add_(step)
    for _weight, old, gradient, new in zip(
        other.parameters(), before, gradients(), model.parameters(), strict=True
    ):
        torch.testing.assert_close(new, old - 0.1 * gradient, rtol=1e-4, atol=1e-5)
        assert not torch.equal(new, old) or not gradient.any(), "a control"
    assert all(torch.equal(statistics[name], value) for name, value in model.named_buffers())
    assert any(not torch.equal(statistics[name], value) for name, value in other.named_buffers()), (
        "a control: the second pass would move them"
    )


# --- NAD


def test_attention_is_the_power_sum_over_channels_in_length_one() -> None:
    maps = torch.randn(2, 5, 3, 4, generator=generator())
    found = METHOD["nad"].attention(maps, 3.0)
    for image in range(2):
        raw = [
            sum(abs(maps[image, c, i, j].item()) ** 3 for c in range(5))
            for i in range(3)
            for j in range(4)
        ]
        length = math.sqrt(sum(value**2 for value in raw))
        assert found[image].tolist() == pytest.approx([v / (length + 1e-6) for v in raw], rel=1e-4)
    one = METHOD["nad"].attention(torch.rand(2, 5, 1, 1) + 1, 2.0)
    assert one.flatten().tolist() == pytest.approx([1, 1])


def test_nads_maps_are_those_of_the_last_stages() -> None:
    nad, model = METHOD["nad"], network().eval()
    with nad.stage_maps(model, nad.Config(betas=(1.0, 2.0))) as found:
        model(images().images.float() / 255)
    assert [tuple(maps.shape) for maps in found] == [(18, 8, 2, 2), (18, 16, 1, 1)]
    assert nad.stage_weights(nad.Config(betas=(1.0, 2.0, 3.0)), found) == (2.0, 3.0)


def test_nad_takes_one_pass_of_the_student_a_step(tmp_path: Path) -> None:
    nad, run = METHOD["nad"], Run(tmp_path, seed=0, device=CPU)
    config = nad.Config(teacher_epochs=0, epochs=3, batch_size=9, guard_drop=None)
    model = nad.defend(view_of(network(), images()), config, run)
    assert model.network.layer1[0].bn1.num_batches_tracked == 3 * 2


# --- FST


def test_the_last_layer_begins_anew_and_keeps_its_length(tmp_path: Path) -> None:
    fst, run = METHOD["fst"], Run(tmp_path, seed=0, device=CPU)
    original = network().network.linear.weight.detach()
    last = nn.Linear(16, 3)
    fst.renew(last, run)
    assert last.weight.abs().max() <= 0.25 and not torch.equal(last.weight, original)
    fst.rescale(last.weight, original)
    assert last.weight.norm().item() == pytest.approx(original.norm().item(), rel=1e-5)
    config = fst.Config(epochs=2, guard_drop=None)
    model = fst.defend(view_of(network(), images()), config, run)
    weight = model.network.linear.weight
    assert weight.norm().item() == pytest.approx(original.norm().item(), rel=1e-5)


def test_fst_turns_the_last_layer_away(tmp_path: Path) -> None:
    """More alpha, less inner product with the poisoned layer."""
    fst, original = METHOD["fst"], network().network.linear.weight.detach()
    products = []
    for alpha in (0.0, 5.0):
        config = fst.Config(epochs=5, alpha=alpha, guard_drop=None)
        folder = tmp_path / str(alpha)
        folder.mkdir()
        model = fst.defend(view_of(network(), images()), config, Run(folder, seed=0, device=CPU))
        products.append((model.network.linear.weight * original).sum().item())
    assert products[1] < products[0] - 0.05


# --- kills


SHORT: dict[str, dict[str, Any]] = {
    "anp": dict(iterations=6, batch_size=6),
    "bti_dbf": dict(
        rounds=2,
        generator_width=2,
        batch_size=9,
        identity_epochs=1,
        mask_epochs=1,
        invert_epochs=1,
        unlearn_epochs=1,
    ),
    "fp": dict(epochs=4, batch_size=9),
    "fst": dict(epochs=4, batch_size=9),
    "ft_sam": dict(epochs=4, batch_size=9),
    "nad": dict(teacher_epochs=2, epochs=2, batch_size=9),
    "nc": dict(search_epochs=2, search_batch_size=9, works=0, index=0, epochs=2, batch_size=9),
    "npd": dict(epochs=4, batch_size=9),
    "rnp": dict(unlearn_epochs=2, unlearn_until=0.0, recover_epochs=2, batch_size=9),
}


class Stop(BaseException):
    """A kill."""


@pytest.mark.parametrize("name", sorted(SHORT))
@pytest.mark.parametrize("at", [3, 6])
def test_a_kill_changes_nothing(
    name: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in a step and started again: every weight, mask and average is the same."""
    module = METHOD[name]
    monkeypatch.setattr(engine, "ROUND", 2)
    config, real = module.Config(**SHORT[name]), Run.step

    def go(folder: str) -> dict[str, Tensor]:
        (tmp_path / folder).mkdir(exist_ok=True)
        run = Run(tmp_path / folder, seed=0, device=CPU)
        model = module.defend(view_of(network(width=4), images()), config, run)
        found = {f"model.{key}": value for key, value in model.state_dict().items()}
        for path in (tmp_path / folder).glob("checkpoint-*.safetensors"):
            for key, value in reading.read_tensors(path)[0].items():
                found[f"{path.stem}.{key}"] = value
        return found

    def stopping(count: list[int]) -> Callable[..., None]:
        def step(self: Run, *arguments: Any) -> None:
            count[0] += 1
            if count[0] == at:
                raise Stop
            real(self, *arguments)

        return step

    whole = go("whole")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", stopping([0]))
        with pytest.raises(Stop):
            go("killed")
    killed = go("killed")
    assert whole.keys() == killed.keys() and len(whole) > 100
    assert [key for key in whole if not torch.equal(whole[key], killed[key])] == []
