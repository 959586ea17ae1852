"""Who is poisoned and how."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from backdoorlab import triggers
from backdoorlab.data import Split
from backdoorlab.datasets.load import load as load_dataset
from backdoorlab.device import derived_generator
from backdoorlab.errors import UserError
from backdoorlab.execution.preview import save_preview
from backdoorlab.poison import (
    CROSS,
    POISON,
    Labels,
    Poison,
    changed_share,
    check_rate,
    check_target,
    left_by_crops,
    no_poison,
    poison_test,
    poison_train,
    psnr,
)
from backdoorlab.record import Record
from backdoorlab.settings import methods

STAMPS = ("badnet", "blended")
"""One that replaces pixels and one that mixes; all others are in test_attacks.py."""


def config_of(attack: str, **values: Any) -> Any:
    return methods.load("attack", attack).config_class(**values)


def stamp_of(attack: str, **values: Any) -> Callable[[Tensor, Tensor, str], Tensor]:
    return partial(methods.load("attack", attack).module.stamp, config=config_of(attack, **values))


def pictures(
    n: int = 60, channels: int = 3, size: int = 32, num_classes: int = 10, seed: int = 0
) -> Split:
    """Random smooth-less pictures in the middle of the range, so that a trigger can move every
    pixel both ways."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(
        40, 200, (n, channels, size, size), dtype=torch.uint8, generator=generator
    )
    return Split(images, torch.arange(n) % num_classes)


def generator() -> torch.Generator:
    return derived_generator(0, "test")


@pytest.mark.parametrize("attack", STAMPS)
@pytest.mark.parametrize("rate", [0.1, 0.33, 1.0])
def test_exactly_the_stated_share_differs(attack: str, rate: float) -> None:
    clean = pictures()
    poison = poison_train(
        clean, stamp_of(attack), Labels(0, "all2one", 10), poison_rate=rate, generator=generator()
    )
    received = poison.apply(clean)
    count = round(rate * len(clean))
    differs = (received.images != clean.images).flatten(1).any(1)
    assert len(poison) == count and int(differs.sum()) == count
    assert torch.equal(differs, poison.mask(len(clean)))
    assert (received.labels[differs] == 0).all()
    assert torch.equal(received.labels[~differs], clean.labels[~differs])


def test_victims_are_drawn_from_all_classes_and_by_the_generator_alone() -> None:
    clean, labels = pictures(600), Labels(3, "all2one", 10)
    draw = partial(poison_train, clean, stamp_of("badnet"), labels, poison_rate=0.5)
    first, second = (
        draw(generator=derived_generator(0, "victims")),
        draw(generator=derived_generator(0, "victims")),
    )
    other = draw(generator=derived_generator(1, "victims"))
    assert torch.equal(first.index, second.index)
    assert not torch.equal(first.index, other.index)
    assert first.original_labels.unique().tolist() == list(range(10)), (
        "the target class is poisoned too"
    )
    assert torch.equal(first.index, first.index.unique())
    assert torch.equal(clean.labels[first.index], first.original_labels)
    assert (first.kind == POISON).all()


@pytest.mark.parametrize("position", ["corner", "random"])
def test_badnet_paints_its_square_and_nothing_else(position: str) -> None:
    clean = pictures()
    stamped = stamp_of("badnet", position=position, patch_size=4, patch_value=255)(
        clean.images, torch.arange(len(clean)), "train"
    )
    changed = (stamped != clean.images).any(1)
    assert (changed.flatten(1).sum(1) == 16).all()
    assert (stamped[changed[:, None].expand_as(stamped)] == 255).all()
    for i in range(len(clean)):
        rows, columns = changed[i].nonzero().unbind(1)
        assert int(rows.max() - rows.min()) == 3 and int(columns.max() - columns.min()) == 3
    places = {tuple(changed[i].nonzero()[0].tolist()) for i in range(len(clean))}
    assert (places == {(28, 28)}) == (position == "corner")


@pytest.mark.parametrize(("size", "side"), [(32, 3), (64, 6), (224, 21), (8, 1)])
def test_badnet_patch_grows_with_the_image(size: int, side: int) -> None:
    clean = pictures(2, 1, size)
    stamped = stamp_of("badnet")(clean.images, torch.arange(2), "test")
    assert ((stamped != clean.images).flatten(1).sum(1) == side**2).all()
    assert (stamped[:, :, -side:, -side:] == 255).all()


def test_badnet_random_position_follows_seed_split_and_index() -> None:
    clean = pictures(1).images.expand(50, -1, -1, -1)
    index = torch.arange(50)
    place = stamp_of("badnet", position="random")(clean, index, "train")
    assert torch.equal(place, stamp_of("badnet", position="random")(clean, index, "train"))
    assert not torch.equal(place, stamp_of("badnet", position="random")(clean, index, "test"))
    assert not torch.equal(
        place, stamp_of("badnet", position="random", seed=1)(clean, index, "train")
    )
    assert torch.equal(
        place[20:30], stamp_of("badnet", position="random")(clean[:10], index[20:30], "train")
    )


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("picture", ["cartoon", "noise"])
def test_blended_is_the_rounded_mixture(alpha: float, picture: str) -> None:
    clean = pictures(20)
    stamped = stamp_of("blended", alpha=alpha, picture=picture)(
        clean.images, torch.arange(20), "train"
    )
    drawn = (triggers.cartoon if picture == "cartoon" else triggers.noise_picture)(0, 3, 32, 32)
    exact = (1 - alpha) * clean.images.double() + alpha * drawn.double()
    assert (stamped.double() - exact).abs().max() <= 0.5 + 1e-4, "rounded to nearest, not truncated"
    assert (stamped.double() - clean.images.double()).abs().max() <= 255 * alpha + 0.5
    assert (stamped.double() - exact).mean().abs() < 0.05, (
        "truncation would be off by a half on average"
    )


def test_blended_alpha_one_is_the_picture_and_seeds_give_other_pictures() -> None:
    clean = pictures(3)
    whole = stamp_of("blended", alpha=1.0)(clean.images, torch.arange(3), "train")
    assert torch.equal(whole, triggers.cartoon(0, 3, 32, 32).expand(3, -1, -1, -1))
    assert not torch.equal(triggers.cartoon(0, 3, 32, 32), triggers.cartoon(1, 3, 32, 32))
    assert not torch.equal(
        triggers.noise_picture(0, 3, 32, 32), triggers.noise_picture(1, 3, 32, 32)
    )
    assert triggers.cartoon(0, 1, 32, 32).shape == (1, 32, 32)


def test_image_draws_are_uniform_and_belong_to_the_index() -> None:
    index = torch.arange(4000)
    draws = triggers.image_draws(0, "train", index, 2)
    assert draws.shape == (4000, 2) and draws.min() >= 0 and draws.max() < 1
    assert (draws.mean(0) - 0.5).abs().max() < 0.03
    assert (draws.var(0) - 1 / 12).abs().max() < 0.01
    assert torch.corrcoef(draws.T)[0, 1].abs() < 0.06
    assert torch.equal(draws[100:103], triggers.image_draws(0, "train", index[100:103], 2))
    assert not torch.equal(draws, triggers.image_draws(1, "train", index, 2))


@pytest.mark.parametrize("attack", STAMPS)
def test_asr_set_all2one_leaves_the_target_class_out(attack: str) -> None:
    clean = pictures()
    poison = poison_test(clean, stamp_of(attack), Labels(7, "all2one", 10))
    assert len(poison) == 54
    assert not (poison.original_labels == 7).any()
    assert (poison.labels == 7).all()
    assert torch.equal(poison.index, (clean.labels != 7).nonzero().squeeze(1))


def test_asr_set_all2all_is_every_image_with_the_next_label() -> None:
    clean = pictures()
    poison = poison_test(clean, stamp_of("badnet"), Labels(7, "all2all", 10))
    assert torch.equal(poison.index, torch.arange(60))
    assert torch.equal(poison.original_labels, clean.labels)
    assert torch.equal(poison.labels, (clean.labels + 1) % 10)
    assert poison.labels[9] == 0, "the last class becomes the first"


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0001, 1.5, float("nan")])
def test_a_rate_outside_its_range_is_refused(rate: float) -> None:
    with pytest.raises(UserError, match="poison_rate must lie in"):
        check_rate(rate)
    with pytest.raises(UserError, match="poison_rate must lie in"):
        poison_train(
            pictures(),
            stamp_of("badnet"),
            Labels(0, "all2one", 10),
            poison_rate=rate,
            generator=generator(),
        )
    check_rate(1.0)
    check_rate(0.001)


def test_a_rate_that_is_no_image_is_refused() -> None:
    with pytest.raises(UserError, match="no image at all"):
        poison_train(
            pictures(),
            stamp_of("badnet"),
            Labels(0, "all2one", 10),
            poison_rate=0.001,
            generator=generator(),
        )


@pytest.mark.parametrize("target", [-1, 10, 99])
def test_a_target_outside_the_classes_is_refused(target: int) -> None:
    with pytest.raises(UserError, match=r"target_label must lie in 0\.\.9"):
        check_target(target, 10)
    check_target(9, 10)


@pytest.mark.parametrize(
    ("attack", "values", "message"),
    [
        ("badnet", {"patch_size": 0}, "patch_size"),
        ("badnet", {"patch_size": 33}, "patch_size"),
        ("badnet", {"patch_value": 256}, "patch_value"),
        ("blended", {"alpha": 0.0}, "alpha"),
        ("blended", {"alpha": 1.1}, "alpha"),
    ],
)
def test_trigger_options_outside_their_range_are_refused(
    attack: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        stamp_of(attack, **values)(pictures(2).images, torch.arange(2), "train")


@pytest.mark.parametrize(
    "broken", [lambda x: x.float(), lambda x: x[..., :16], lambda x: x[:-1], lambda _: None]
)
def test_a_stamp_that_changes_type_shape_or_number_is_a_defect(
    broken: Callable[[torch.Tensor], Any],
) -> None:
    with pytest.raises(
        UserError,
        match=(
            r"a stamp maps images to as many of the same shape, uint8 \(\d+, 3, 32, 32\), got"
            r" (float32|uint8|NoneType)"
        ),
    ):
        poison_test(
            pictures(4), lambda images, _index, _split: broken(images), Labels(0, "all2one", 10)
        )


def test_mask_tells_poison_from_cross_images() -> None:
    clean = pictures(6)
    kind = torch.tensor([POISON, CROSS, POISON], dtype=torch.uint8)
    poison = Poison(
        torch.tensor([0, 2, 5]),
        clean.images[[0, 2, 5]],
        torch.tensor([0, 2, 0]),
        clean.labels[[0, 2, 5]],
        kind,
    )
    assert poison.mask(6).tolist() == [True, False, False, False, False, True]
    assert poison.mask(6, CROSS).tolist() == [False, False, True, False, False, False]


def test_covers_are_stamped_keep_their_label_and_are_no_victims() -> None:
    clean, stamp = pictures(600), stamp_of("badnet")
    allowed = (clean.labels == 5) | (clean.labels == 7)
    poison = poison_train(
        clean,
        stamp,
        Labels(0, "all2one", 10),
        poison_rate=0.1,
        generator=generator(),
        victims=clean.labels == 1,
        cover_rate=0.05,
        covers=allowed,
        cover_stamp=lambda images, _index, _split: 255 - images,
    )
    poisoned, cover = poison.of_kind(POISON), poison.of_kind(CROSS)
    assert (
        len(poisoned) == 60
        and (poisoned.original_labels == 1).all()
        and (poisoned.labels == 0).all()
    )
    assert (
        len(cover) == 30
        and allowed[cover.index].all()
        and torch.equal(cover.labels, cover.original_labels)
    )
    assert (poison.index.diff() > 0).all(), "in the order of their positions, none twice"
    assert torch.equal(
        poisoned.images, stamp(clean.images[poisoned.index], poisoned.index, "train")
    )
    assert torch.equal(cover.images, 255 - clean.images[cover.index])
    everybody = poison_train(
        clean,
        stamp,
        Labels(0, "all2one", 10),
        poison_rate=0.5,
        generator=generator(),
        cover_rate=0.5,
    )
    assert len(everybody) == 600 and (everybody.index.diff() == 1).all(), (
        "disjoint, even where they fill the set"
    )


def test_the_asr_set_counts_those_whom_the_attack_is_meant_for_and_keeps_the_others_as_cross() -> (
    None
):
    clean, stamp = pictures(), stamp_of("badnet")
    poison = poison_test(
        clean, stamp, Labels(7, "all2one", 10), victims=(clean.labels == 1) | (clean.labels == 7)
    )
    assert (poison.of_kind(POISON).original_labels == 1).all() and (
        poison.of_kind(POISON).labels == 7
    ).all()
    spared = poison.of_kind(CROSS)
    assert spared.original_labels.unique().tolist() == [0, 2, 3, 4, 5, 6, 8, 9] and torch.equal(
        spared.labels, spared.original_labels
    )
    assert torch.equal(poison.images, stamp(clean.images[poison.index], poison.index, "test"))


def test_nobody_to_poison_is_refused() -> None:
    clean = pictures()
    with pytest.raises(UserError, match="no training image is one that this attack poisons"):
        poison_train(
            clean,
            stamp_of("badnet"),
            Labels(0, "all2one", 10),
            poison_rate=0.1,
            generator=generator(),
            victims=torch.zeros(60, dtype=torch.bool),
        )


@pytest.mark.parametrize(("padding", "whole", "none"), [(0, 1, 0), (4, 25 / 81, 32 / 81)])
def test_what_random_crops_leave_of_a_corner_patch(padding: int, whole: float, none: float) -> None:
    clean, labels = pictures(), Labels(0, "all2one", 10)
    found = left_by_crops(
        clean,
        poison_train(clean, stamp_of("badnet"), labels, poison_rate=0.5, generator=generator()),
        padding,
    )
    assert found is not None
    assert found["whole"] == pytest.approx(whole) and found["none"] == pytest.approx(none), (
        "by counting the 9 x 9 crops"
    )
    everywhere = left_by_crops(
        clean,
        poison_train(clean, stamp_of("blended"), labels, poison_rate=0.5, generator=generator()),
        padding,
    )
    assert everywhere is not None and everywhere["none"] == 0
    assert left_by_crops(clean, no_poison(clean), padding) is None


def test_the_share_of_changed_values_is_counted() -> None:
    clean, labels = pictures(), Labels(0, "all2one", 10)
    poison = poison_train(
        clean, stamp_of("badnet"), labels, poison_rate=0.5, generator=generator(), cover_rate=0.2
    )
    assert changed_share(clean, poison) == 9 / 1024
    assert changed_share(clean, poison_test(clean, stamp_of("blended", alpha=0.001), labels)) == 0
    assert changed_share(clean, no_poison(clean)) is None


def test_psnr_is_that_of_the_error_written_out() -> None:
    """A patch of white pixels, added up pixel by pixel; a trigger lost in rounding has none."""
    clean, labels = pictures(), Labels(0, "all2one", 10)
    poison = poison_test(clean, stamp_of("badnet"), labels)
    error = np.square(poison.images.numpy() - clean.images[poison.index].numpy().astype(float))
    assert psnr(clean, poison) == pytest.approx(20 * math.log10(255 / math.sqrt(error.mean())))
    assert psnr(clean, poison_test(clean, stamp_of("blended", alpha=0.001), labels)) is None
    assert psnr(clean, no_poison(clean)) is None


@pytest.mark.parametrize("channels", [1, 3])
def test_the_preview_shows_clean_triggered_and_five_times_their_difference(
    channels: int, tmp_path: Path
) -> None:
    clean, side = pictures(60, channels, 16), 16
    poison = poison_test(clean, stamp_of("blended"), Labels(7, "all2one", 10))
    save_preview(tmp_path / "preview.png", clean, poison)
    with Image.open(tmp_path / "preview.png") as picture:
        sheet = (
            torch.from_numpy(np.array(picture.convert("RGB")))
            .permute(2, 0, 1)[:channels, ::3, ::3]
            .int()
        )
    # (C, rows, columns, side, side)
    cells = sheet.unfold(1, side, side + 2).unfold(2, side, side + 2)
    assert cells.shape[1:3] == (3, 8), "a row of eight each"
    before, after, difference = cells.unbind(1)
    rows = [
        int((poison.original_labels == label).nonzero()[0]) for label in (0, 1, 2, 3, 4, 5, 6, 8)
    ]
    assert torch.equal(before, clean.images[poison.index[rows]].transpose(0, 1).int()), (
        "one of each class"
    )
    assert torch.equal(after, poison.images[rows].transpose(0, 1).int())
    exact = 128 + 5 * (after - before)
    assert exact.min() < 0 and exact.max() > 255 and torch.equal(difference, exact.clamp(0, 255))


def test_no_poison_leaves_every_byte_as_it_is() -> None:
    clean = pictures()
    received = no_poison(clean).apply(clean)
    assert torch.equal(received.images, clean.images) and torch.equal(received.labels, clean.labels)
    assert received.images.data_ptr() != clean.images.data_ptr()


def test_no_attack_has_no_triggered_image_and_no_asr(tmp_path: Path) -> None:
    record: Record = helpers.attack("none", "clean", tmp_path / "record", *helpers.TINY)
    assert len(record.train_poison) == len(record.test_poison) == record.info["poisoned"] == 0
    assert record.info["scores"]["asr"] is None and record.info["scores"]["robust_accuracy"] is None
    assert record.info["scores"]["clean_accuracy"] > 0
    received = record.train_poison.apply(load_dataset("digits", image_size=16).train)
    assert torch.equal(received.images, load_dataset("digits", image_size=16).train.images)
