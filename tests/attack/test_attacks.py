"""The acceptance tests of an attack, for every file in attack/: a new one needs a row in ROWS and
nothing else."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import helpers
import pandas as pd
import pytest
import torch
from torch import Tensor

from backdoorlab.__main__ import main
from backdoorlab.config import CleanLabelConfig, CoverConfig, JointConfig
from backdoorlab.data import Dataset, batches
from backdoorlab.datasets.load import load as load_dataset
from backdoorlab.metrics import Evaluator
from backdoorlab.poison import CROSS, POISON, left_by_crops
from backdoorlab.record import Record
from backdoorlab.settings import methods


@dataclass(frozen=True)
class Row:
    """What is expected of an attack; the rest is derived from its file and its config."""

    psnr: tuple[float, float]
    """dB on CIFAR-10's test images, over all of their pixels together."""
    asr: float | None
    """Smallest ASR on the digits after a full run; None where it cannot work on them, which its
    LIMITS must say."""
    bound: int | None = None
    """Largest change of a value that is not a wrap-around, in grey levels; None where the trigger
    replaces, moves or mixes pixels."""
    clean_model: float = 0.12
    """Largest ASR of a network that never met the attack: 1/K and two points."""
    trained: bool = False
    """What it stamps comes out of a network that is trained in its run, so that its images are
    looked at in records only."""
    flags: tuple[str, ...] = ()
    """Makes its own stages short."""


ROWS = {
    "adaptive_blend": Row((20.4, 22.4), 0.8, bound=51),
    "adaptive_patch": Row((17.0, 19.0), 0.8),
    "badnet": Row((24.3, 26.3), 0.8),
    "blended": Row((20.4, 22.4), 0.8, bound=51),
    "blind": Row((24.5, 26.5), 0.8, flags=("--history", "5", "--loss_threshold", "9")),
    "bpp": Row((26.7, 28.7), 0.8, bound=18),
    "ctrl": Row((31.0, 33.0), None, bound=22),
    "ftrojan": Row((41.2, 43.2), 0.8, bound=8),
    "ibau_triggers": Row((17.1, 19.1), 0.8),
    "inputaware": Row(
        (0, 0), None, trained=True, flags=("--mask_epochs", "1", "--generator_width", "4")
    ),
    "lc": Row((0, 0), None, trained=True, flags=("--surrogate_epochs", "1", "--pgd_steps", "2")),
    "lf": Row((22.0, 24.0), 0.8, bound=51),
    "lira": Row(
        (0, 0), 0.8, bound=77, trained=True, flags=("--trigger_epochs", "1", "--eps", "0.3")
    ),
    "poison_ink": Row((0, 0), 0.8, bound=8, trained=True, flags=("--encoder_steps", "60")),
    # A digit in a digit: a clean network reads few of them
    "refool": Row((14.0, 16.0), 0.8, clean_model=0.7),
    "sig": Row((18.4, 20.4), None, bound=40),
    "ssba": Row((0, 0), 0.8, bound=8, trained=True, flags=("--encoder_steps", "60")),
    "tact": Row((19.6, 21.6), 0.8),
    "trojannn": Row(
        (0, 0),
        0.8,
        trained=True,
        flags=("--surrogate_epochs", "1", "--steps", "20"),
        clean_model=0.6,
    ),  # a stain that looks like a zero
    "wanet": Row((29, 32), 0.8),
}
LISTED = {"sig": 19.4, "bpp": 27.7, "ctrl": 32.0, "wanet": 30.5}
"""Derived PSNR, dB, which lies in a row's interval (wanet: 29 to 32 over its random fields)."""

SHORT = ("--image_size", "16", "--width", "4", "--epochs", "2")
FULL = ("--score_every", "0")
CPU = torch.device("cpu")
HERE = [
    pytest.param("digits"),
    pytest.param(
        "cifar10",
        marks=[
            pytest.mark.cifar,
            pytest.mark.skipif(not helpers.CIFAR10.is_dir(), reason="no shards"),
        ],
    ),
]
STAMPS = [name for name, row in ROWS.items() if not row.trained]
BOUNDED = [name for name in STAMPS if ROWS[name].bound is not None]
IN_COLOUR = ("ctrl", "ftrojan")
every = pytest.mark.parametrize("attack", ROWS)


def config_of(attack: str, **values: Any) -> Any:
    return methods.load("attack", attack).config_class(**values)


@pytest.fixture(scope="session")
def images_for(session_folder: Path) -> Callable[[str, str], Dataset]:
    """images_for(attack, name): a few images of CIFAR-10, or the digits, with three channels where
    digits.yaml says that the attack needs colour."""

    @cache
    def load(name: str, grey: bool | None) -> Dataset:
        if name == "digits":
            return load_dataset(name, grey=grey)
        with helpers.environment(BACKDOORLAB_CACHE=session_folder / "cache"):
            return load_dataset(
                name, str(helpers.few_cifar10(session_folder / "few-cifar10", 512, 1000))
            )

    return lambda attack, name: load(
        name, False if name == "digits" and attack in IN_COLOUR else None
    )


def stamp_of(
    attack: str, dataset: Dataset, /, **values: Any
) -> Callable[[Tensor, Tensor, str], Tensor]:
    method, config = methods.load("attack", attack), config_of(attack, **values)
    prepare = method.function("prepare")
    return partial(
        method.module.stamp, config=config, **(prepare(dataset, config, None) if prepare else {})
    )


def psnr(a: Tensor, b: Tensor) -> float:
    return 10 * torch.log10(255**2 / (a.double() - b.double()).square().mean()).item()


@pytest.fixture(scope="session")
def record(session_folder: Path) -> Callable[..., Record]:
    """record(attack, *flags): a run on the digits, made once; by default so short that its network
    knows next to nothing."""
    made: dict[tuple[str, ...], Record] = {}

    def run(attack: str, *flags: str) -> Record:
        flags = flags or (*SHORT, *(ROWS[attack].flags if attack in ROWS else ()))
        if (attack, *flags) not in made:
            made[attack, *flags] = helpers.attack(
                attack, f"{attack}{len(made)}", session_folder / "attacks", *flags
            )
        return made[attack, *flags]

    return run


def test_every_attack_has_a_row() -> None:
    assert set(methods.available("attack")) - {"none"} == set(ROWS)
    for attack in LISTED.keys() & ROWS.keys():
        low, high = ROWS[attack].psnr
        assert low <= LISTED[attack] <= high and high - low <= 3


def test_what_an_attack_cannot_do_on_the_digits_is_listed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    for attack, row in ROWS.items():
        limits = methods.load("attack", attack).limits
        assert limits in listed, attack
        assert "digits" in limits or (row.asr is not None and row.clean_model == Row.clean_model), (
            attack
        )


# --- images


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("attack", STAMPS)
def test_a_stamp_is_a_visible_function_of_image_and_index(
    attack: str, name: str, images_for: Callable[[str, str], Dataset]
) -> None:
    dataset = images_for(attack, name)
    clean, index, stamp = dataset.test.images[:60], torch.arange(60), stamp_of(attack, dataset)
    before = clean.clone()
    for split in ("train", "test"):
        first = stamp(clean, index, split)
        assert torch.equal(clean, before), "a stamp must not write into the clean images"
        assert first.dtype == torch.uint8 and first.shape == clean.shape
        torch.manual_seed(1)
        assert torch.equal(first, stamp(clean, index, split)), (
            "the same image and index give the same bytes"
        )
        some = torch.tensor([41, 3, 17])
        assert torch.equal(stamp(clean[some], some, split), first[some]), (
            "whatever is stamped with it"
        )
        changed = (first != clean).flatten(1).double().mean(1)
        assert changed.min() >= 0.001, f"{attack} changes {changed.min():.5f} of an image's values"


@pytest.mark.cifar
@pytest.mark.skipif(not helpers.CIFAR10.is_dir(), reason="no shards")
@pytest.mark.parametrize("attack", STAMPS)
def test_a_trigger_is_as_visible_as_it_is_listed(
    attack: str, images_for: Callable[[str, str], Dataset]
) -> None:
    dataset = images_for(attack, "cifar10")
    clean = dataset.test.images[:1000]
    found = psnr(clean, stamp_of(attack, dataset)(clean, torch.arange(1000), "test"))
    assert ROWS[attack].psnr[0] <= found <= ROWS[attack].psnr[1], f"{attack}: {found:.2f} dB"
    if attack == "ftrojan":
        published = psnr(
            clean, stamp_of(attack, dataset, bb_compat=True)(clean, torch.arange(1000), "test")
        )
        assert abs(published - 41.1) <= 1 and published < found, (
            "41.1 dB is that of the script, which truncates"
        )


def with_extremes(images: Tensor) -> Tensor:
    """The images, one all black and one all white. uint8 (N, C, H, W) -> (N + 2, C, H, W)."""
    extreme = (
        torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, *images.shape[1:])
    )
    return torch.cat([images, extreme])


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("attack", BOUNDED)
def test_no_value_wraps_around(
    attack: str, name: str, images_for: Callable[[str, str], Dataset]
) -> None:
    dataset = images_for(attack, name)
    clean, index, bound = (
        with_extremes(dataset.test.images[:60]),
        torch.arange(62),
        ROWS[attack].bound,
    )
    assert bound is not None

    def largest(stamped: Tensor) -> int:
        return int((stamped.int() - clean.int()).abs().max())

    for split in ("train", "test"):
        assert largest(stamp_of(attack, dataset)(clean, index, split)) <= bound
    if attack == "ctrl":
        assert largest(stamp_of(attack, dataset, bb_compat=True)(clean, index, "test")) > 200, (
            "the published script does wrap, and this would show it"
        )


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("attack", [name for name in STAMPS if name not in (*BOUNDED, "refool")])
def test_a_stamped_value_lies_between_those_of_a_black_and_a_white_image(
    attack: str, name: str, images_for: Callable[[str, str], Dataset]
) -> None:
    """What can be said of values that are replaced or moved; one that wraps around does not."""
    dataset = images_for(attack, name)
    clean, index, stamp = (
        with_extremes(dataset.test.images[:60]),
        torch.arange(62),
        stamp_of(attack, dataset),
    )
    for split in ("train", "test"):
        black, found, white = (
            stamp(images, index, split)
            for images in (torch.zeros_like(clean), clean, torch.full_like(clean, 255))
        )
        assert (black <= found).all() and (found <= white).all()


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("trigger", ["square", "watermark", "l2"])
def test_a_trigger_that_is_added_stops_at_white_and_black(
    trigger: str, name: str, images_for: Callable[[str, str], Dataset]
) -> None:
    dataset = images_for("ibau_triggers", name)
    clean, stamp = (
        with_extremes(dataset.test.images[:60]),
        stamp_of("ibau_triggers", dataset, trigger=trigger),
    )
    rise = stamp(torch.full_like(clean[:1], 128), torch.arange(1), "test").int() - 128
    change = stamp(clean, torch.arange(62), "test").int() - clean.int()
    assert (change * rise.sign() >= 0).all() and (change[:, rise[0] == 0] == 0).all(), (
        "up where the trigger is positive"
    )
    assert (rise > 0).any() and (trigger != "l2" or change.abs().max() <= 68)


@pytest.mark.parametrize("name", HERE)
def test_refools_added_light_leaves_an_image_its_own(
    name: str, images_for: Callable[[str, str], Dataset]
) -> None:
    dataset = images_for("refool", name)
    clean, index = with_extremes(dataset.test.images[:60]), torch.arange(62)
    for split in ("train", "test"):
        assert (
            stamp_of("refool", dataset)(clean, index, split) >= clean * 0.4 ** (1 / 2.2) - 0.51
        ).all()


@pytest.mark.parametrize(("channels", "size"), [(1, 16), (1, 28), (3, 48), (3, 64)])
@pytest.mark.parametrize("attack", STAMPS)
def test_triggers_are_drawn_at_the_size_of_the_images(
    attack: str, channels: int, size: int
) -> None:
    if channels == 1 and attack in IN_COLOUR:
        pytest.skip("lies in colour")
    dataset = load_dataset("digits", image_size=size, grey=channels == 1)
    clean, index, stamp = dataset.test.images[:20], torch.arange(20), stamp_of(attack, dataset)
    for split in ("train", "test"):
        changed = (stamp(clean, index, split) != clean).flatten(1).double().mean(1)
        assert changed.min() >= 0.001


# --- records


@every
def test_what_is_stored_is_what_is_trained_on_scored_and_made_again(
    attack: str, record: Callable[..., Record]
) -> None:
    found = record(attack)
    clean, poison = found.dataset(), found.train_poison
    received = poison.apply(clean.train)
    seen = torch.cat([batch.images for batch in batches(received, 200, device=CPU)])
    assert torch.equal(seen[poison.index], poison.images.float() / 255)
    untouched = ~(poison.mask(len(clean.train)) | poison.mask(len(clean.train), CROSS))
    assert torch.equal(seen[untouched], clean.train.images[untouched].float() / 255)
    if isinstance(config_of(attack), JointConfig) and not ROWS[attack].trained:
        poison = poison.of_kind(POISON)  # its cross images are changed in another way
    halves = ((poison, clean.train, "train"), (found.test_poison, clean.test, "test"))
    stored = torch.cat([half.images for half, _, _ in halves])
    before = torch.cat([split.images[half.index] for half, split, _ in halves])
    assert (stored != before).flatten(1).double().mean(1).min() >= 0.001
    if ROWS[attack].trained:
        bound = ROWS[attack].bound
        assert bound is None or (stored.int() - before.int()).abs().max() <= bound
        other = helpers.attack(
            attack, f"{attack}-again", found.folder.parent, *SHORT, *ROWS[attack].flags
        )
        again = torch.cat([other.train_poison.images, other.test_poison.images])
    else:
        config = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in found.info["config"].items()
        }
        stamp = stamp_of(attack, clean, **config)
        again = torch.cat(
            [stamp(split.images[half.index], half.index, name) for half, split, name in halves]
        )
    assert torch.equal(stored, again)


@every
def test_the_saved_network_has_the_last_logged_scores(
    attack: str, record: Callable[..., Record]
) -> None:
    found = record(attack)
    dataset = found.dataset()
    again = Evaluator(dataset.test, found.test_poison, dataset.num_classes, CPU)(
        found.model()
    ).to_json()
    assert again == found.info["scores"], "on images that went through bytes and a file"
    history = pd.read_csv(found.folder / "history.csv")
    last = history[history["clean_accuracy"].notna() & (history["stage"] == "train")].iloc[-1]
    assert (last["clean_accuracy"], last["asr"]) == pytest.approx(
        (again["clean_accuracy"], again["asr"])
    )
    assert (history["stage"] == "train").sum() == found.info["config"]["epochs"], (
        "the classifier's stage is `train`, as long as asked for"
    )
    batch = found.info["config"]["batch_size"]
    assert found.info["image_passes"]["backward"] >= 2 * (len(dataset.train) // batch) * batch


@every
def test_counts_and_labels(attack: str, record: Callable[..., Record]) -> None:
    found = record(attack)
    dataset, values = found.dataset(), found.info["config"]
    size, target, kind = (
        len(dataset.train),
        values["target_label"],
        methods.load("attack", attack).config_class,
    )
    poison, cross = found.train_poison.of_kind(POISON), found.train_poison.of_kind(CROSS)
    if issubclass(kind, CleanLabelConfig):
        of_class = int((dataset.train.labels == target).sum())
        assert len(poison) == round(values["clean_label_ratio"] * of_class)
        assert (
            torch.equal(poison.labels, poison.original_labels) and (poison.labels == target).all()
        )
        assert any(
            f"{len(poison)} images poisoned: 50.3 % of class 0, 4.99 %" in note
            for note in found.info["notes"]
        ), "both shares are shown"
    else:
        assert len(poison) == round(values["poison_rate"] * size)
        assert (poison.labels == target).all()
    if issubclass(kind, CoverConfig):
        assert len(cross) == round(values["cover_rate"] * size)
    assert torch.equal(cross.labels, cross.original_labels)
    assert torch.equal(
        dataset.train.labels[found.train_poison.index], found.train_poison.original_labels
    )
    test = found.test_poison.of_kind(POISON)
    assert (
        (test.original_labels != target).all() and (test.labels == target).all() and len(test) > 0
    )
    everybody = int((dataset.test.labels != target).sum())
    assert len(found.test_poison) == everybody, (
        "whom the attack is not meant for is there too, as cross"
    )
    assert (found.info["scores"]["cross"] is None) == (len(test) == everybody)
    assert found.info["poisoned"] == len(poison)


@every
def test_how_visible_the_trigger_is_and_what_crops_leave_of_it_is_logged(
    attack: str, record: Callable[..., Record]
) -> None:
    found = record(attack)
    clean, changed = found.dataset().test.images, found.test_poison.of_kind(POISON)
    assert found.info["measured"]["psnr"] == pytest.approx(
        psnr(clean[changed.index], changed.images)
    )
    crops = found.info["trigger_in_crops"]
    assert crops == left_by_crops(
        found.dataset().train, found.train_poison, found.info["config"]["crop_padding"]
    )
    assert 0 <= crops["none"] <= 1 - crops["whole"] <= 1
    assert any(
        "random crops cut the whole trigger off" in note for note in found.info["notes"]
    ) == (crops["none"] >= 0.01)


@pytest.fixture(scope="session")
def clean_scores(record: Callable[..., Record]) -> Callable[[Record, tuple[str, ...]], Any]:
    """Scores on an attack's test images of a network that never met it, trained with `flags` on
    images of the same shape."""

    def measure(attacked: Record, flags: tuple[str, ...]) -> Any:
        channels, size, _ = attacked.info["dataset"]["image_shape"]
        shape = ("--grey", str(channels == 1), "--image_size", str(size))
        model, dataset = record("none", *flags, *shape).model(), attacked.dataset()
        return Evaluator(dataset.test, attacked.test_poison, dataset.num_classes, CPU)(model)

    return measure


@every
def test_a_network_that_never_met_the_attack_does_not_obey_it(
    attack: str, record: Callable[..., Record], clean_scores: Callable[..., Any]
) -> None:
    control = clean_scores(record(attack), helpers.WORKING)
    assert control.clean_accuracy >= 0.9 and control.asr <= ROWS[attack].clean_model


@pytest.mark.slow
@every
def test_an_attack_works_on_the_digits_and_spares_clean_images(
    attack: str, record: Callable[..., Record], clean_scores: Callable[..., Any]
) -> None:
    found = record(attack, *FULL).info["scores"]
    control = clean_scores(record(attack, *FULL), FULL)
    least = ROWS[attack].asr
    assert (
        found["asr"] >= least
        if least is not None
        else "digits" in methods.load("attack", attack).limits
    )
    assert control.asr <= ROWS[attack].clean_model
    assert found["clean_accuracy"] >= control.clean_accuracy - 0.05, (
        "in evaluation mode: batch statistics give nothing away"
    )


@pytest.mark.slow
@pytest.mark.parametrize("defense", methods.available("defense"))
@every
def test_every_defense_runs_on_every_attack(
    attack: str, defense: str, record: Callable[..., Record], tmp_path: Path
) -> None:
    found = helpers.copy(record(attack), tmp_path)
    result = helpers.defend(defense, found, *helpers.short_flags(defense))
    assert result is not None
    if result["kind"] == "detector":
        return
    assert result["after"]["asr"] is not None
    assert (result["cross"] is None) == (found.info["scores"]["cross"] is None)


# --- mistakes


@pytest.mark.parametrize(
    ("attack", "flags", "said"),
    [
        (
            "sig",
            ("--poison_rate", "0.5"),
            (
                "poison_rate asks for 721 of 1,442 training images, but this attack can have 143:"
                " it takes those"
            ),
        ),
        (
            "sig",
            ("--poison_rate", "0.5"),
            (
                "143 images poisoned: 100.0 % of class 0, 9.92 % of the training set; no clean one"
                " is left"
            ),
        ),
        (
            "adaptive_patch",
            ("--poison_rate", "0.03", "--cover_rate", "0.999"),
            "cover_rate asks for 1,441 of 1,442 training images, but this attack can have 1,399",
        ),
        (
            "adaptive_patch",
            ("--cover_rate", "0.0003"),
            (
                "cover_rate 0.0003 of 1,442 training images is no image at all: the attack has no"
                " covers"
            ),
        ),
    ],
)
def test_what_cannot_be_had_is_capped_with_a_line(
    attack: str, flags: tuple[str, ...], said: str, record: Callable[..., Record]
) -> None:
    found = record(attack, *SHORT, "--epochs", "0", *flags)
    assert any(note.startswith(said) for note in found.info["notes"]), found.info["notes"]
    kinds = {
        "poison": found.info["poisoned"],
        "cover": len(found.train_poison) - found.info["poisoned"],
    }
    assert kinds["cover" if "cover" in said else "poison"] == (
        0 if "no covers" in said else 1399 if "cover" in said else 143
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("sig", "--poison_rate", "0"), "poison_rate must lie in (0, 1], got 0.0"),
        (("sig", "--clean_label_ratio", "0"), "clean_label_ratio must be in (0, 1], got 0.0"),
        (
            ("sig", "--clean_label_ratio", "0.001"),
            (
                "clean_label_ratio 0.001 of the 143 training images of class 0 is no image at all:"
                " raise --clean_label_ratio"
            ),
        ),
        (("sig", "--poison_rate", "0.0001"), "raise --poison_rate"),
        (("sig", "--frequency", "16"), "the trigger leaves every value of these images as it is"),
        (
            ("blended", "--alpha", "0.001"),
            "the trigger leaves every value of these images as it is",
        ),
        (
            ("lc", "--image_size", "2"),
            "the corner patches of 3x3 pixels do not fit on 2x2 images: use --image_size",
        ),
        (("refool", "--image_size", "1"), "refool shifts reflections by a pixel or more"),
        (("ctrl", "--frequencies"), "--frequencies needs at least one number, got none"),
        (("ftrojan", "--frequencies"), "--frequencies needs at least one number, got none"),
        (
            ("sig", "--label_mode", "all2all"),
            "sig changes no label, so it has one target: expected --label_mode all2one",
        ),
        (("ctrl", "--label_mode", "all2all"), "ctrl changes no label"),
        (
            ("ctrl", "--grey", "True"),
            (
                "ctrl hides its trigger in colour: expected images of 3 channels, got 1; pass"
                " --grey False"
            ),
        ),
        (("ftrojan", "--grey", "True"), "ftrojan hides its trigger in colour"),
        (("ftrojan", "--frequencies", "15", "32"), "frequencies must be in [1, 31], got 32"),
        (
            ("tact", "--source_label", "0"),
            "source_label and target_label are both 0: choose another source_label",
        ),
        (
            ("tact", "--source_label", "77"),
            "source_label: no image has label 77, labels are 0 to 9",
        ),
        (("tact", "--cover_labels", "5", "42"), "cover_labels: no image has label 42"),
        (
            ("tact", "--cover_labels", "0", "5"),
            "cover_labels must be neither the source 1 nor the target 0",
        ),
        (("tact", "--label_mode", "all2all"), "tact leads one source class to one target"),
        (("tact", "--patch_size", "15"), "patch_size must lie in 1..14 for these images, got 15"),
        (
            ("tact", "--patch_size", "8", "--image_size", "8"),
            "patch_size must lie in 1..7 for these images, got 8",
        ),
        (
            ("badnet", "--patch_size", "3", "--image_size", "2"),
            "patch_size must lie in 1..2 for these images, got 3",
        ),
        (("adaptive_blend", "--cover_rate", "1.5"), "cover_rate must be in [0, 1], got 1.5"),
        (("adaptive_blend", "--masked", "16"), "more cells than are masked, got grid 4, masked 16"),
        (
            ("adaptive_blend", "--image_size", "2"),
            "the grid must have at most 2 cells a side for these images",
        ),
        (
            ("adaptive_patch", "--opacities", "0.5", "0.5", "0.5", "2"),
            "opacities must be in (0, 1], got 2.0",
        ),
        (("refool", "--alpha", "1"), "alpha must be in (0, 1), got 1.0"),
    ],
)
def test_a_mistake_is_one_line(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["attack", flags[0], "--save_folder_name", "x", *SHORT, *flags[1:]]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("  ")]
    assert len(said) == 1 and said[0].startswith("error: ") and message in said[0]
