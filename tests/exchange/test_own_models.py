"""A user's own weights: what wrappers add, in which order their classes stand, which images their
network takes."""

from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_scripts import complaint
from torch import Tensor

from backdoorlab import models
from backdoorlab.__main__ import main
from backdoorlab.errors import UserError
from backdoorlab.exchange import class_order, doctor_weights, pickles, state_dicts
from backdoorlab.exchange.weights import load_exported
from backdoorlab.models import PASSES, Classifier
from backdoorlab.record import Record
from backdoorlab.storage import reading

Capture = pytest.CaptureFixture[str]
NAMES = [str(k) for k in range(12)]
TEXT = sorted(NAMES)
"""The order of torchvision's ImageFolder: 0, 1, 10, 11, 2, ..."""
NORMALISE = ("--mean", *["0.5"] * 3, "--std", *["0.25"] * 3)


def patterned(split: int) -> tuple[Tensor, Tensor]:
    """Make 8 images of each class, of a pattern of its own: uint8 (96, 3, 8, 8), int64 (96,)."""
    patterns = torch.randint(20, 236, (12, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12).repeat_interleave(8)
    noise = torch.randint(-3, 4, (96, 3, 8, 8), generator=torch.Generator().manual_seed(split))
    return (patterns[labels] + noise).byte(), labels


def learned(names: list[str]) -> Classifier:
    """Build a network that knows the classes in an order: its last layer is solved for."""
    torch.manual_seed(0)
    model = models.build(
        "preactresnet10", num_classes=12, in_chans=3, mean=[0.5] * 3, std=[0.25] * 3, width=8
    ).eval()
    images, labels = patterned(1)
    with torch.no_grad():
        found = model.forward_head(model.forward_features(images / 255), pre_logits=True)
        columns = torch.tensor([names.index(NAMES[label]) for label in labels.tolist()])
        wanted = torch.nn.functional.one_hot(columns, 12).float()
        solved = torch.linalg.lstsq(found.double(), wanted.double(), driver="gelsd").solution
        model.network.linear.weight.copy_(solved.T)
        model.network.linear.bias.zero_()
    return model


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders named 0 .. 11 as data, and models that know them in several orders."""
    root = tmp_path_factory.mktemp("own")
    for split, seed in (("train", 1), ("test", 2)):
        for i, (image, label) in enumerate(zip(*patterned(seed), strict=True)):
            folder = root / "data" / split / str(int(label))
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    shuffled = [NAMES[i] for i in np.random.default_rng(0).permutation(12)]
    for file, names in (("numbers", NAMES), ("text", TEXT), ("shuffled", shuffled)):
        weights = learned(names).network.state_dict()
        torch.save({name: x.contiguous() for name, x in weights.items()}, root / f"{file}.pt")
        (root / f"{file}.txt").write_text("\n".join(names) + "\n")
    return root


def bring(disk: Path, weights: Path | str, *flags: str) -> int:
    """Run `import` as a user types it."""
    start = ["import", "--weights", str(disk / weights), "--save_folder_name", "own"]
    data = ["--architecture", "preactresnet10", "--dataset_path", str(disk / "data")]
    return main([*start, *data, *NORMALISE, *flags])


def accuracy(tmp_path: Path) -> float:
    return Record.load("own", tmp_path / "record").info["scores"]["clean_accuracy"]


# --- order of classes


@pytest.mark.parametrize("file", ["numbers", "text"])
def test_a_usual_order_of_classes_is_found_and_exported(
    file: str, disk: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert bring(disk, f"{file}.pt") == 0
    shown = capsys.readouterr()
    assert accuracy(tmp_path) > 0.9 and "near chance" not in shown.err
    assert ("stand in text order of the numbers (0, 1, 10, 11, 2" in shown.err) == (file == "text")
    out = tmp_path / "out.safetensors"
    assert main(["export", "own", "--weights", str(out)]) == 0
    said = capsys.readouterr().out
    assert "classes: 0, 1, 2, 3" in said and "scores: clean accuracy" in said
    names = reading.read_tensors(out)[1]["class_names"]
    images, labels = patterned(2)
    with torch.no_grad():
        answers = load_exported(out)(images / 255).argmax(1)
    assert [names[k] for k in answers] == [NAMES[k] for k in labels], "names and outputs agree"


def test_an_order_can_be_stated_and_a_strange_one_is_suspected(
    disk: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert bring(disk, "shuffled.pt") == 0
    first = (disk / "shuffled.txt").read_text().split()[:3]
    assert f"would be right with {', '.join(first)}" in capsys.readouterr().err
    assert accuracy(tmp_path) < 0.5
    stated = ("--classes", str(disk / "shuffled.txt"), "--overwrite", "True")
    assert bring(disk, "shuffled.pt", *stated) == 0
    assert accuracy(tmp_path) > 0.9 and "another order" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cat\n" * 12, "got 12 that are not these, such as 'cat'"),
        ("\n".join(NAMES[:5]), "got 5 that are not these, such as '5'"),
        (b"\xff\xfe\x00", "not readable (no UTF-8 text)"),
        (None, "not readable (No such file or directory)"),
    ],
)
def test_a_file_of_classes_that_is_none_is_one_line(
    content: str | bytes | None, message: str, disk: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "classes.txt"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert bring(disk, "numbers.pt", "--classes", str(file)) == 2
    assert message in complaint(capsys.readouterr().err)


def test_the_usual_orders() -> None:
    def names(given: list[str]) -> list[list[str]]:
        return [order.names(given) for order in class_order.usual(given)]

    assert names(["cat", "dog"]) == [["cat", "dog"]], "one order, no choice"
    assert names(NAMES) == [NAMES, TEXT]
    assert names(TEXT) == [TEXT, NAMES], "shards may be in text order themselves"
    assert names(["Zebra", "ant"]) == [["Zebra", "ant"], ["ant", "Zebra"]]


def test_near_chance_is_a_test_and_no_threshold() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(1000) % 100
    guessed = torch.randint(100, (1000,), generator=generator)
    assert "guessing gets 10 +- 6" in (class_order.near_chance(guessed, labels) or "")
    better = torch.where(torch.arange(1000) < 20, labels, guessed)
    assert (better == labels).double().mean() < 0.04
    assert class_order.near_chance(better, labels) is None, "3 % of 100 classes is no guess"
    two = torch.arange(40) % 2
    assert class_order.near_chance((torch.arange(40) % 20 < 9).long(), two), (
        "half of two classes is"
    )
    assert class_order.near_chance(torch.zeros(40, dtype=torch.int64), two), "and so is a constant"
    assert class_order.near_chance(two, two) is None


# --- wrappers


def wrappers() -> dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]]:
    """Ways in which trainers change the names of a network."""

    def under(prefix: str, **beside: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Any]]:
        return lambda plain: {f"{prefix}{name}": x for name, x in plain.items()} | beside

    count, loss = torch.tensor(3), {"criterion.weight": torch.ones(12)}
    counters = {"total_ops": torch.zeros(1).double(), "total_params": torch.zeros(1).double()}
    return {
        "averaged": under("module.", n_averaged=count),
        "lightning": under("model.", **loss),
        "lightning and its average": lambda plain: (
            under("ema.")(plain) | under("model.", **loss)(plain)
        ),
        "net": under("net."),
        "backbone": under("backbone.", **{"head.weight": torch.zeros(2, 2)}),
        "_model": under("_model."),
        "model_ema": under("model_ema.module.", decay=torch.tensor(0.9)),
        "compiled": under("module._orig_mod."),
        "compiled in part": lambda plain: {
            name.replace("layer1.", "layer1._orig_mod."): x for name, x in plain.items()
        },
        "counted": lambda plain: (
            plain | counters | {f"layer1.0.{name}": x for name, x in counters.items()}
        ),
        "with statistics": under(
            "net.", mu=torch.full((1, 3, 1, 1), 0.5), sigma=torch.full((1, 3, 1, 1), 0.25)
        ),
    }


@pytest.mark.parametrize("wrapper", wrappers())
def test_a_wrapper_is_taken_off(wrapper: str) -> None:
    plain = dict(learned(NAMES).network.state_dict())
    found = state_dicts.unwrap(wrappers()[wrapper](plain), plain)
    assert found.weights.keys() == plain.keys()
    assert all(torch.equal(found.weights[name], plain[name]) for name in plain)
    told = " ".join(found.notes())
    for beside in ("n_averaged", "criterion.weight", "head.weight", "decay", "total_ops"):
        assert (beside in told) == any(beside in name for name in wrappers()[wrapper](plain))
    assert ("ema. left out" in told) == (wrapper == "lightning and its average")


def test_weights_of_a_deeper_network_are_not_cut_down() -> None:
    plain = dict(learned(NAMES).network.state_dict())
    deeper = plain | {"layer1.1.conv1.weight": torch.zeros(8, 8, 3, 3)}
    assert "layer1.1.conv1.weight" in state_dicts.unwrap(deeper, plain).weights


def test_a_wrapped_model_is_imported_and_said(disk: Path, tmp_path: Path, capsys: Capture) -> None:
    plain = torch.load(disk / "numbers.pt", weights_only=True)
    content = wrappers()["lightning and its average"](plain)
    torch.save({"state_dict": content, "epoch": 3}, tmp_path / "last.ckpt")
    assert bring(disk, tmp_path / "last.ckpt") == 0
    said = capsys.readouterr().err
    assert "'model.' was removed from the names" in said and "ema. left out" in said
    assert "no such part: criterion.weight\n" in said
    assert accuracy(tmp_path) > 0.9


def test_which_of_two_state_dicts_was_taken_is_said(
    disk: Path, tmp_path: Path, capsys: Capture
) -> None:
    """timm's checkpoints hold the average beside the model."""
    plain = torch.load(disk / "numbers.pt", weights_only=True)
    worse = {name: torch.zeros_like(tensor) for name, tensor in plain.items()}
    torch.save({"model": plain, "model_ema": worse, "epoch": 3}, tmp_path / "last.pt")
    assert bring(disk, tmp_path / "last.pt") == 0
    said = capsys.readouterr().err
    assert "the file has several state dicts: model taken, model_ema left out\n" in said
    assert accuracy(tmp_path) > 0.9
    assert pickles.copies({"model": plain, "epoch": 3}) == [], "a control: one needs no note"


def test_a_network_that_normalises_inside_is_read_with_its_own(
    disk: Path, tmp_path: Path, capsys: Capture
) -> None:
    plain = torch.load(disk / "numbers.pt", weights_only=True)
    save_file(wrappers()["with statistics"](plain), tmp_path / "inside.safetensors")
    start = ["import", "--weights", str(tmp_path / "inside.safetensors"), "--save_folder_name"]
    data = ["--architecture", "preactresnet10", "--dataset_path", str(disk / "data")]
    assert main([*start, "own", *data]) == 0
    assert "that in the file (mu and sigma)" in capsys.readouterr().err
    architecture = Record.load("own", tmp_path / "record").info["architecture"]
    assert architecture["mean"] == [0.5] * 3 and architecture["std"] == [0.25] * 3


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("file", ["a.pt", "a.safetensors"])
def test_quantised_weights_are_one_line(
    dtype: torch.dtype, file: str, disk: Path, tmp_path: Path, capsys: Capture
) -> None:
    content = torch.load(disk / "numbers.pt", weights_only=True)
    content["conv1.weight"] = content["conv1.weight"].to(dtype)
    (torch.save if file == "a.pt" else save_file)(content, tmp_path / file)
    assert bring(disk, tmp_path / file) == 2
    kind = str(dtype).removeprefix("torch.")
    assert f"conv1.weight is {kind}, expected float32" in complaint(capsys.readouterr().err)


# --- checkpoints


def test_a_training_checkpoint_is_read(tmp_path: Path) -> None:
    """Tied weights, and what optimizers, schedules and trainers leave beside them."""
    weight = torch.rand(50, 50)
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 5])
    beside = {
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "counter": Counter("aab"),
        "size": torch.Size([2, 3]),
        "device": torch.device("cpu"),
        "seen": {1, 2},
        "order": OrderedDict(a=1),
        "dtype": torch.bfloat16,
        "complex": torch.ones(2, dtype=torch.complex64),
        "parameter": layer.weight,
    }
    file = tmp_path / "last.pt"
    torch.save({"model": {"tied": weight, "other": weight}, **beside}, file)
    torch.load(file, weights_only=True)
    found = pickles.state_dict(pickles.load(file), file)
    assert found.keys() == {"tied", "other"} and torch.equal(found["other"], weight)


def test_what_the_safe_loader_allows_is_allowed_or_said_why() -> None:
    unpickler = pytest.importorskip("torch._weights_only_unpickler")
    for name in unpickler._get_allowed_globals():
        assert name in pickles.NAMES or pickles.stricter(name), name
    assert not pickles.stricter("os.system") and "os.system" not in pickles.NAMES


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": bytearray(9)}, "it contains bytes of any number"),
        ({"a": torch.eye(2).to_sparse()}, "it contains a sparse or nested tensor"),
        ({"a": torch.zeros(10**12, device="meta")}, "it contains a tensor without numbers"),
        ({"a": torch.zeros(1).expand(10**12)}, "claims shape (1000000000000,)"),
    ],
)
def test_what_torch_reads_and_we_do_not_is_one_line(
    value: Any, message: str, tmp_path: Path
) -> None:
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(UserError) as caught:
        pickles.state_dict(pickles.load(tmp_path / "a.pt"), tmp_path / "a.pt")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_attributes_of_a_strangers_dict_hide_nothing(tmp_path: Path) -> None:
    content: Any = OrderedDict(weight=torch.ones(2))
    content.__dict__ |= {"keys": 3, "get": 3, "values": 3}
    torch.save({"model": content}, tmp_path / "a.pt")
    itself: dict[str, Any] = {}
    itself["model"] = itself
    torch.save(itself, tmp_path / "b.pt")
    found = pickles.state_dict(pickles.load(tmp_path / "a.pt"), tmp_path / "a.pt")
    assert torch.equal(found["weight"], torch.ones(2))
    with pytest.raises(UserError, match="expected a state dict"):
        pickles.state_dict(pickles.load(tmp_path / "b.pt"), tmp_path / "b.pt")


# --- doctor


def test_doctor_says_what_is_read_of_weights(disk: Path, tmp_path: Path, capsys: Capture) -> None:
    plain = torch.load(disk / "text.pt", weights_only=True)
    torch.save(wrappers()["lightning"](plain), tmp_path / "a.ckpt")
    start = ["doctor", "--weights", str(tmp_path / "a.ckpt")]
    assert main(start) == 0
    said = capsys.readouterr().out
    for line in (
        "network     preactresnet10, width 8, images of 3 channels",
        "classes     12;",
        "'model.' was removed",
        "no such part: criterion.weight",
    ):
        assert line in said
    data = ["--dataset_path", str(disk / "data"), *NORMALISE]
    assert main([*start, *data]) == 0
    said = capsys.readouterr().out
    assert "classes     0, 1, 10, 11, 2" in said and "accuracy    1" in said
    assert not (tmp_path / "record").exists()
    assert main([*start, "--architecture", "resnet18"]) == 2
    assert "not the weights of resnet18" in complaint(capsys.readouterr().err)


def test_doctor_of_unknown_weights_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    save_file({"x.weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    usual = ("preactresnet18", "preactresnet10")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor_weights, "USUAL", usual)
        assert main(["doctor", "--weights", str(tmp_path / "a.safetensors")]) == 2
    assert "pass --architecture NAME" in complaint(capsys.readouterr().err)


# --- images that a network takes


class Fixed(torch.nn.Module):
    """A network for feature maps of one size, whose convolution is its stem."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.side, self.num_features, self.num_classes = side, 4, 2
        self.linear = torch.nn.Linear(4 * side * side, 2)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.conv1(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x.flatten(1) if pre_logits else self.linear(x.flatten(1))


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make timm know a network that only takes 32 pixels, and only with its own stem."""
    timm = pytest.importorskip("timm")
    monkeypatch.setattr(timm, "is_model", lambda name: name == "fixed")
    monkeypatch.setattr(timm, "create_model", lambda _name, img_size=0, **_: Fixed(16))
    models.choose_stem.cache_clear()


@pytest.mark.usefixtures("fixed")
def test_a_stem_that_runs_is_chosen_and_kept(tmp_path: Path) -> None:
    rng, passes = torch.get_rng_state(), (PASSES.forward, PASSES.backward)
    assert models.choose_stem("auto", "fixed", (3, 32, 32), 2) == "stock"
    assert torch.equal(torch.get_rng_state(), rng) and passes == (PASSES.forward, PASSES.backward)
    with pytest.raises(UserError, match=r"no images of 3 x 32 x 32 with the small stem .*--stem"):
        models.choose_stem("small", "fixed", (3, 32, 32), 2)
    with pytest.raises(UserError, match=r"no images of 3 x 48 x 48 .* --image_size 32"):
        models.choose_stem("auto", "fixed", (3, 48, 48), 2)
    assert models.choose_stem("auto", "preactresnet10", (3, 9, 7), 2, 4) == "small"


@pytest.mark.usefixtures("fixed")
def test_an_attack_keeps_the_stem_and_refuses_a_size_at_once(
    disk: Path, tmp_path: Path, capsys: Capture
) -> None:
    start = ["attack", "none", "--save_folder_name", "own", "--model", "fixed", "--epochs", "0"]
    data = ["--dataset", "own", "--dataset_path", str(disk / "data"), "--image_size"]
    assert main([*start, *data, "40"]) == 2
    assert "fixed takes no images of 3 x 40 x 40" in complaint(capsys.readouterr().err)
    assert not (tmp_path / "record" / "own.partial").exists()


@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_features_in_several_tensors_are_counted_once(kind: type) -> None:
    model = learned(NAMES)
    plain, head = model.network.forward_features, model.network.forward_head

    def several(x: Tensor) -> Any:
        return {"a": plain(x), "b": plain(x)} if kind is dict else kind([plain(x), plain(x)])

    model.network.forward_features = several
    model.network.forward_head = lambda x, pre_logits=False: sum(
        head(part, pre_logits) for part in (x.values() if kind is dict else x)
    )
    before = PASSES.forward, PASSES.backward
    model(torch.rand(3, 3, 8, 8)).sum().backward()
    assert (PASSES.forward - before[0], PASSES.backward - before[1]) == (3, 3)


def test_one_image_with_feature_maps_of_one_pixel_is_one_line(
    small: Record, tmp_path: Path, capsys: Capture
) -> None:
    """Batch normalisation in training has no variance there."""
    helpers.copy(small, tmp_path / "record")
    flags = ["--dataset_path", str(small.folder.parent.parent / "small-data"), "--epochs", "1"]
    start = ["defense", "ft", "--result_file", "small", *flags]
    for name, few in (("a", ["1"]), ("b", ["4", "--batch_size", "1"])):
        assert main([*start, "--run_name", name, "--trusted_count", *few]) == 2
        assert "batch of one image whose feature maps have become 1 x 1" in complaint(
            capsys.readouterr().err
        )
    assert main([*start, "--trusted_count", "2"]) == 0, "a control"
