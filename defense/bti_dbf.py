"""BTI-DBF: trigger inversion by decoupling benign features.

Towards Reliable and Efficient Backdoor Trigger Inversion via Decoupling Benign Features. X. Xu, K.
Huang, Y. Li, Z. Qin, K. Ren. ICLR 2024 (spotlight). https://openreview.net/forum?id=Tw9wemV6cb .
Written from a description of the published code, whose constants it has; the paper itself was not
read.

Assumes: the poisoned model, whose last features are one tensor, and a few trusted images.

Other inversions look for a trigger of each class. This one first finds the benign features, which
are those that clean images need, and then asks what can be done to an image that leaves them as
they are and changes all others.
  0. Train a generator G, a U-Net, to return images as they are.
In each round, f being the last features and h what follows them:
  1. Decouple: learn a mask m so that h(m f) is right on trusted images and h((1 - m) f) is wrong.
  2. Invert: train G, anew from step 0, so that G(x) keeps m f and is far from x in (1 - m) f; while
     G(x) is too far from x, or m f from its own, G learns to return x.
  3. The class in which the model sees most of the G(x) is the backdoor's target. In later rounds
     step 2 also asks for this class.
  4. Unlearn: fine-tune on trusted images and, for a tenth of them, on G(x) as well, with the true
     label and the features of x.

Departs: the network is in evaluation mode in steps 1 to 3. Features of x and G(x) come from one
pass, which moves batch statistics once; x itself is learned beside G(x), not replaced by it. The
U-Net halves images twice, the published one has four blocks. A guard undoes epochs that destroy the
model (backdoorlab/repair/guard.py).
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import Batch, Split, batches, in_order, to_bytes, to_device
from backdoorlab.device import seeded
from backdoorlab.errors import UserError
from backdoorlab.models import Classifier, trained_weights
from backdoorlab.models.unet import UNet
from backdoorlab.perturb import frozen
from backdoorlab.record import DefenderView
from backdoorlab.repair.finetuning import augmented_batches
from backdoorlab.repair.guard import GuardConfig, guarded_epochs
from backdoorlab.run import Run

ASSUMES = ("model", "trusted")
PICTURED = 16
"""Trusted images that are shown beside what G makes of them."""


@dataclass(frozen=True, kw_only=True)
class Config(GuardConfig, DefenseConfig):
    rounds: int = 5
    """Times that a trigger is inverted and unlearned. More find triggers that the first left."""
    batch_size: int = 128
    """Images a step of every part. Smaller batches take more steps."""
    generator_width: int = 32
    """Channels of the generator at full size."""
    generator_lr: float = 1e-3
    """Adam's learning rate of the generator."""
    identity_epochs: int = 50
    """Passes over the trusted images in which the generator learns to return them."""
    mask_epochs: int = 20
    """Passes in which the mask learns. More decouple benign features further."""
    mask_lr: float = 0.01
    """Adam's learning rate of the mask."""
    invert_epochs: int = 30
    """Passes in which the generator learns the trigger. More find triggers that are harder."""
    image_limit: float = 0.3
    """Mean squared change of normalised images up to which the generator may go on. More lets it
    make larger triggers."""
    feature_limit: float = 3.0
    """Mean squared change of benign features up to which it may go on."""
    benign_weight: float = 0.01
    """Weight of keeping benign features."""
    noise: float = 0.03
    """Standard deviation, in normalised images, of the noise on the images that tell the target."""
    unlearn_epochs: int = 30
    """Passes over the trusted images that unlearn. More forget more, and cost clean accuracy."""
    unlearn_lr: float = 1e-4
    """Adam's learning rate of the network."""
    painted: float = 0.1
    """Share of a batch that the generator changes in unlearning; one image more is changed."""

    RANGES: ClassVar[dict[str, str]] = {
        "rounds": ">= 0",
        "batch_size": ">= 1",
        "generator_width": ">= 1",
        "generator_lr": ">= 0",
        "identity_epochs": ">= 0",
        "mask_epochs": ">= 0",
        "mask_lr": ">= 0",
        "invert_epochs": ">= 0",
        "image_limit": ">= 0",
        "feature_limit": ">= 0",
        "benign_weight": ">= 0",
        "noise": ">= 0",
        "unlearn_epochs": ">= 0",
        "unlearn_lr": ">= 0",
        "painted": "[0, 1]",
    }


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    model, trusted = view.load_model().eval(), to_device(view.trusted, run.device)
    channels = view.image_shape[0]
    with seeded(config.seed, "generator"):
        generator = UNet(channels, channels, config.generator_width).to(run.device)

    # Step 0: G returns images as they are.
    learn_identity(generator, model, trusted, config, run)
    identity, target = copy.deepcopy(generator.state_dict()), None

    for number in range(1, config.rounds + 1):
        # Steps 1 and 2, of the network as it is now.
        with frozen(model.eval()):
            mask = decouple(model, trusted, config, run, number)
            generator.load_state_dict(identity)
            invert(generator, model, mask, target, trusted, config, run, number)

        # Step 3: the target is what most images become.
        shares = answers(generator, model, trusted, view.num_classes, config, run)
        target = int(shares.argmax())
        name = view.class_names[target]
        run.note(
            f"round {number}: {100 * shares.max():.1f} % of inverted images are seen as {name}"
        )
        shown = first(trusted, run)[:PICTURED]
        with torch.no_grad():
            run.picture(f"round{number}", [to_bytes(shown), to_bytes(painted(generator, shown))])

        # Step 4.
        unlearn(generator, model, view, trusted, config, run, number)
    return model


def learn_identity(
    generator: UNet, model: Classifier, trusted: Split, config: Config, run: Run
) -> None:
    """Train G in place so that G(x) = x; resumable."""
    optimizer = torch.optim.Adam(generator.parameters(), lr=config.generator_lr)
    for _ in run.epochs(
        "identity", config.identity_epochs, generator=generator, optimizer=optimizer
    ):
        for batch in shuffled(trusted, config, run):
            apart = image_change(model, batch.images, generator(batch.images))
            run.step(optimizer, apart)


class Mask(nn.Module):
    """One number in (0, 1) for each of the last features: how far it is a benign one."""

    def __init__(self, shape: torch.Size, run: Run) -> None:
        super().__init__()
        drawn = torch.randn(shape, generator=run.generator)
        self.weight = nn.Parameter(drawn.to(run.device))

    def forward(self) -> Tensor:
        return self.weight.tanh() / 2 + 0.5


def decouple(model: Classifier, trusted: Split, config: Config, run: Run, number: int) -> Tensor:
    """Learn which features are benign: a mask of the shape of those of one image, in (0, 1)."""
    mask = Mask(features(model, first(trusted, run)[:1]).shape, run)
    optimizer = torch.optim.Adam(mask.parameters(), lr=config.mask_lr)
    for _ in run.epochs(f"decouple{number}", config.mask_epochs, mask=mask, optimizer=optimizer):
        for batch in shuffled(trusted, config, run):
            with torch.no_grad(), run.autocast():
                f = features(model, batch.images)

            # CE(h(m f)) - CE(h((1 - m) f)).
            m = mask()
            with run.autocast():
                benign, others = model.forward_head(m * f), model.forward_head((1 - m) * f)
            loss = F.cross_entropy(benign.float(), batch.labels)
            run.step(optimizer, loss - F.cross_entropy(others.float(), batch.labels))
    return mask().detach()


def invert(
    generator: UNet,
    model: Classifier,
    m: Tensor,
    target: int | None,
    trusted: Split,
    config: Config,
    run: Run,
    number: int,
) -> None:
    """Train G in place to change what is not benign; resumable. `target`: known from round 2 on."""
    optimizer = torch.optim.Adam(generator.parameters(), lr=config.generator_lr)
    for _ in run.epochs(
        f"invert{number}", config.invert_epochs, generator=generator, optimizer=optimizer
    ):
        for batch in shuffled(trusted, config, run):
            x = batch.images
            made = painted(generator, x)
            with run.autocast():
                wanted, found = features(model, x).detach(), features(model, made)
                logits = model.forward_head(found).float()
            apart = image_change(model, x, made)
            benign = F.mse_loss(m * found.float(), m * wanted.float())
            others = F.mse_loss((1 - m) * found.float(), (1 - m) * wanted.float())

            # Outside of the limits G goes back towards the identity.
            far = (apart > config.image_limit) | (benign > config.feature_limit)
            loss = torch.where(far, apart, config.benign_weight * benign - others)
            if target is not None:
                loss = loss + F.cross_entropy(logits, torch.full_like(batch.labels, target))
            run.watch(apart=apart, benign=benign, others=others)
            run.step(optimizer, loss)


@torch.no_grad()
def answers(
    generator: UNet, model: Classifier, trusted: Split, classes: int, config: Config, run: Run
) -> Tensor:
    """Compute the share of the classes among the model's answers to G(x + noise), (K,)."""
    counts = torch.zeros(classes, device=run.device)
    for batch in in_order(trusted, run.device):
        drawn = torch.randn(batch.images.shape, generator=run.generator).to(run.device)
        with run.autocast():
            seen = model(painted(generator, batch.images + config.noise * model.std * drawn))
        counts += seen.argmax(1).bincount(minlength=classes)
    return counts / counts.sum()


def unlearn(
    generator: UNet,
    model: Classifier,
    view: DefenderView,
    trusted: Split,
    config: Config,
    run: Run,
    number: int,
) -> None:
    """Fine-tune the model in place on x and on G(x), with the same labels and features."""
    optimizer = torch.optim.Adam(trained_weights(model), lr=config.unlearn_lr)
    for _ in guarded_epochs(
        run, f"unlearn{number}", config.unlearn_epochs, trusted, config, model, optimizer
    ):
        model.train()
        for batch in augmented_batches(trusted, view, config.batch_size, run):
            x, y = batch.images, batch.labels
            count = min(len(x), int(config.painted * len(x)) + 1)
            with torch.no_grad():
                made = painted(generator, x[:count])

            # CE on both with the true label, and MSE(f(x), f(G(x))).
            with run.autocast():
                f = features(model, torch.cat([x, made]))
                logits = model.forward_head(f).float()
            shift = F.mse_loss(f[:count].float(), f[len(x) :].float())
            run.watch(shift=shift)
            run.step(optimizer, F.cross_entropy(logits, torch.cat([y, y[:count]])) + shift)


def shuffled(trusted: Split, config: Config, run: Run) -> Iterator[Batch]:
    """Batches of one pass over the trusted images, as they are."""
    return batches(trusted, config.batch_size, device=run.device, generator=run.generator)


def first(trusted: Split, run: Run) -> Tensor:
    """Return the first trusted images, float (n, C, H, W) in [0, 1]."""
    return next(iter(in_order(trusted, run.device))).images


def features(model: Classifier, x: Tensor) -> Tensor:
    """Compute the last features before pooling; UserError where they are no single tensor."""
    found = model.forward_features(x)
    if not isinstance(found, Tensor):
        raise UserError(
            "the last features of this network are no single tensor"
            f" ({type(model.network).__name__}), which bti_dbf needs; choose another defense"
        )
    return found


def painted(generator: UNet, x: Tensor) -> Tensor:
    """G(x), as images in [0, 1]."""
    return generator(x).clamp(0, 1)


def image_change(model: Classifier, x: Tensor, made: Tensor) -> Tensor:
    """Mean squared difference of two batches of images, in units of normalised ones."""
    return F.mse_loss(made / model.std, x / model.std)


if __name__ == "__main__":
    raise SystemExit(main(__file__))
