"""SAU's acceptance tests, and its lean step against a plain transcription of the published one."""

import math
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.models import PASSES, Classifier, build
from backdoorlab.record import Record
from backdoorlab.run import Run
from backdoorlab.settings import methods
from backdoorlab.storage import reading

sau: Any = methods.load("defense", "sau").module
CPU = torch.device("cpu")


def new_run() -> Run:
    return Run(Path(), seed=0, device=CPU, precision="fp32")


def models(apart: float) -> tuple[Classifier, Classifier]:
    """A poisoned model with believable statistics, and a current one that differs from it by a
    share of each weight."""
    torch.manual_seed(0)
    poisoned, model = (
        build("preactresnet10", num_classes=10, in_chans=1, mean=(0.5,), std=(0.25,), width=4)
        for _ in range(2)
    )
    with torch.no_grad():
        for _ in range(20):
            poisoned.train()(images())
        model.load_state_dict(poisoned.state_dict())
        for parameter in model.parameters():
            parameter.mul_(1 + apart * torch.randn_like(parameter))
    return model.eval(), poisoned.eval().requires_grad_(False)


def images(n: int = 32) -> Tensor:
    return torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(1))


def search(model: Classifier, poisoned: Classifier, **changes: Any) -> Tensor:
    x = images()
    answers: Tensor = poisoned(x).argmax(1)
    return sau.shared_perturbation(
        model, poisoned, x, answers, answers, sau.Config(**changes), new_run()
    )


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_every_pixel_is_up_down_or_untouched(steps: int) -> None:
    eps = torch.tensor(0.2)
    delta = search(*models(0.1), pgd_steps=steps)
    assert torch.isin(delta, torch.stack([-eps, 0 * eps, eps])).all()
    assert (delta == 0).any() == (steps > 0) and (delta < 0).any() == (steps > 1), (
        "steps do move it"
    )
    assert not torch.isin(
        search(*models(0.1), pgd_steps=2, pgd_lr=0.3), torch.stack([-eps, 0 * eps, eps])
    ).all()


def test_the_first_batch_knows_no_divergence() -> None:
    """While theta is the poisoned model's, the two answers are one, and all steps follow the
    adversarial term."""
    same, apart = models(0.0), models(0.1)
    assert torch.equal(search(*same), search(*same, beta2=0.0))
    assert not torch.equal(search(*apart), search(*apart, beta2=0.0))


def test_a_shared_image_has_no_slope_and_stays() -> None:
    model, poisoned = models(0.02)
    x = images()
    believed, answers = poisoned(x).argmax(1), model(x).argmax(1)
    config = sau.Config(eps=0.5)
    seen = 0
    for steps in range(4):
        now = search(model, poisoned, eps=0.5, pgd_steps=steps).requires_grad_()
        loss, shared = sau.search_loss(
            model(x + now).float(), poisoned(x + now).float(), answers, believed, believed, config
        )
        (slope,) = torch.autograd.grad(loss, now)
        then = search(model, poisoned, eps=0.5, pgd_steps=steps + 1)
        assert not slope[shared].any() and torch.equal(then[shared], now[shared])
        assert (
            slope[~shared].flatten(1).any(1).all()
            and (then[~shared] != now[~shared]).flatten(1).any(1).all()
        )
        seen += int(shared.sum())
    assert seen, "there were shared images"


def test_statistics_stay_unless_told(tiny: Record, tmp_path: Path) -> None:
    record = helpers.copy(tiny, tmp_path)
    before = record.model().state_dict()
    for run, train_bn in (("fixed", "False"), ("train", "True")):
        helpers.defend("sau", record, "--n_rounds", "1", "--run_name", run, "--train_bn", train_bn)
        after = reading.read_tensors(record.folder / "defense" / "sau" / run / "model.safetensors")[
            0
        ]
        buffers = [name for name in after if "running" in name]
        assert buffers and all(torch.equal(before[name], after[name]) for name in buffers) == (
            run == "fixed"
        )
        assert any(
            not torch.equal(before[name], after[name])
            for name in after
            if name.endswith("bn1.weight")
        ), "affine parts train in both"


def test_leaving_the_wrong_class_costs_at_most_13_8() -> None:
    logits = torch.zeros(4, 10, dtype=torch.float64)
    logits[0, 3], logits[1, 3], logits[2, 3] = 1000.0, 3.0, -8.0
    logits.requires_grad_()
    wrong, all_of_them = torch.full((4,), 3), torch.ones(4, dtype=torch.bool)
    one = [
        sau.unlearning_loss(logits[i : i + 1], wrong[i : i + 1], all_of_them[i : i + 1])
        for i in range(4)
    ]
    assert one[0].item() == pytest.approx(-math.log(1e-6)) and one[0] <= 13.82
    p = logits.softmax(1)[1, 3].item()
    assert one[1].item() == pytest.approx(-math.log(1 - p + 1e-6)) and one[1] > one[3] > one[2]
    slopes = [
        torch.autograd.grad(loss, logits, retain_graph=True)[0].abs().sum().item() for loss in one
    ]
    assert slopes[2] == 0 and min(slopes[1], slopes[3]) > 1e-3, "no slope below p = 0.001"
    mixed = torch.tensor([True, False, True, False])
    assert sau.unlearning_loss(logits, wrong, mixed).item() == pytest.approx(
        (one[0] + one[2]).item() / 4
    ), "a mean over the batch, not over the fooled"


def test_jensen_shannon_is_its_definition() -> None:
    f, g = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, q = f.softmax(1), g.softmax(1)
    m = (p + q) / 2
    wanted = (
        F.kl_div(m.log(), p, reduction="none").sum(1)
        + F.kl_div(m.log(), q, reduction="none").sum(1)
    ) / 2
    assert torch.allclose(sau.jensen_shannon(f, g), wanted)
    far = torch.tensor([[100.0, 0.0]], dtype=torch.float64)
    assert sau.jensen_shannon(far, far.flip(1)).item() == pytest.approx(math.log(2), abs=1e-5)
    assert not sau.jensen_shannon(f, f).any()


def test_the_lean_step_is_the_published_one() -> None:
    """Same perturbation and loss, 14 forwards and 12 backwards an image instead of 24 and 12 with
    all weight gradients."""
    benchmark = helpers.script("performance/defenses.py")
    published, lean = benchmark.sau_steps(width=4, batch_size=16, device=CPU, precision="fp32")
    for step in range(2):
        counts = []
        results = []
        for side in (published, lean):
            before = PASSES.forward, PASSES.backward
            results.append(side())
            counts.append(((PASSES.forward - before[0]) / 16, (PASSES.backward - before[1]) / 16))
        (delta, loss), (our_delta, our_loss) = results
        assert counts[0] == (24, 12) and counts[1][0] <= 14 and counts[1][1] <= 12
        assert (delta == our_delta).float().mean() > 0.999 and torch.isclose(
            loss, our_loss, rtol=1e-3
        ), step
        assert (delta != 0.2).any() and loss > 0


def test_perturbed_images_stay_in_the_box_when_asked() -> None:
    x = images()
    free, boxed = (x + search(*models(0.1), clip_box=box) for box in (False, True))
    assert boxed.min() >= 0 and boxed.max() <= 1 + 1e-6 and (free.min() < 0 or free.max() > 1.1)


def test_l2_perturbations_stay_in_their_ball() -> None:
    radius = 0.2 * 16
    delta = search(*models(0.1), norm="l2", pgd_lr=0.5, pgd_init="random")
    lengths = delta.flatten(1).norm(dim=1)
    assert lengths.max() <= radius + 1e-4 and delta.abs().max() > 0.21, "a ball, not a cube"
    assert search(*models(0.1), norm="l2", eps=1.0).flatten(1).norm(dim=1).max() <= 1 + 1e-5


def test_the_search_starts_where_it_is_told() -> None:
    def at(init: str) -> Tensor:
        return search(*models(0.1), pgd_steps=0, pgd_init=init)

    assert (at("max") == torch.tensor(0.2)).all() and not at("zero").any()
    random = at("random")
    assert (
        random.abs().max() <= 0.2
        and abs(random.mean()) < 0.01
        and random.std() == pytest.approx(0.2 / math.sqrt(3), abs=0.01)
    )
