"""DAU: backdoor defense via Decoupled Adversarial Unlearning.

Z. Zhu, Machine Intelligence Laboratory, Harbin Institute of Technology (Shenzhen), 2025. No paper
body is public: the losses, the split rule and the constants are those of the author's MindSpore
port, examples/community/DAU in https://github.com/mindspore-ai/mindarmour;
https://github.com/MiLab-HITSZ/DAU holds a README.

Assumes: the poisoned training set and the model trained on it. No clean image, no oracle.

  1. Pool: a small set that is almost pure poison. 2. Anti-learning: with the features fixed, the
  last layer learns all samples but unlearns the pool. The poison outside
     the pool shares its features and is unlearned with it.
  3. Split: a sample is poison if anti-learning took its label from it. 4. Unlearning: from the
  poisoned model, learn the clean part and unlearn the poisoned part with CCE. 5. Recovery (ours,
  only where recovery_epochs says so): learn the poisoned part with what it shows without its
  trigger.

Departs from the port, with reasons and effects in docs/methods/dau.md:
  - The port draws its pool from the true poison; `isolation` is the pre-filter that its configuration describes,
    `bimodal` (the default) is ours, because isolation with a fixed schedule does not find every
    trigger.
  - Anti-learning runs on cached evaluation-mode features, so that the extractor really is fixed; it takes the median of
    several heads, because one is noisy, and clips their gradients, because at beta = 1000 the first
    steps overshoot.
  - What anti-learning took is measured against the poisoned model's own belief, not by a fixed 1 %, which hard clean
    samples fail from the start.
  - CCE is computed from logits, unclamped: clamped probabilities have no gradient exactly where the backdoor is intact.
  - A pool is never larger than half of the cluster it is drawn from, the ascent in `both` is bounded, and two guards
    return the model unharmed where no poison shows or the anti-learned head breaks down.
"""

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import Split, batches, to_device
from backdoorlab.engine import Forward
from backdoorlab.errors import UserError
from backdoorlab.features import Features, extract, predictions
from backdoorlab.models import Classifier, paused
from backdoorlab.record import DefenderView
from backdoorlab.run import Run

ASSUMES = ("model", "train")

PLAIN = 0.7
"""Sarle's coefficient beyond which two groups are plain."""
PLACED = 0.6
"""Sarle's coefficient beyond which it is asked where a label's groups lie; a uniform distribution
has 5/9, clean labels of CIFAR-10 up to .57."""
MANY, TORN = 100, 0.75
"""Samples that do not look like another class by chance; fewer must be of a label whose Sarle's
coefficient is beyond the second."""
ENOUGH = 20
"""Samples of a label below which its features say nothing: Sarle's coefficient of ten points in
many dimensions is beyond 0.45 by chance."""
TOGETHER = 5
"""Samples that can be said to lie together."""
FEW = 5
"""Other labels below which it is not known where labels usually lie, and what a probe says of one
tells little."""
PROBED = 20_000
"""Samples of the other labels that a probe learns from, at most."""
ANSWERED = 20_000
"""Samples on which all heads answer at once, at most."""
APART = 2.0
"""Standard deviations beyond which two normal distributions of one spread are two peaks and not
one."""
STAYED = 0.5
"""Share of flagged samples that still get their label after unlearning, above which the result says
so."""
READ = 250
"""Flagged samples of which batch statistics are taken at once, at most."""


@dataclass(frozen=True, kw_only=True)
class Config(DefenseConfig):
    subtask: Literal["all", "anti_learning", "unlearning", "test"] = "all"
    """anti_learning stops once the split is written, unlearning goes on from it, test only scores
    the saved model."""
    pool: Literal["bimodal", "isolation", "model_loss"] = "bimodal"
    """How the first poison is found: a label whose features fall in two (ours), early learning
    (ABL), lowest loss."""
    pool_rate: float = 0.01
    """|P0| / N: larger pools lead the head better, but soon hold what should be found."""
    bimodality: float = 0.45
    """Sarle's coefficient above which a label is cut in two halves that may be one clean and one
    poisoned (1/3 normal, 5/9 uniform, 1 two points); a mixture, and the last two questions, are
    asked below it as well."""
    variety: float = 0.6
    """Share of the other labels' variety of classes that a group must show to be taken for poison;
    lower finds more, and false alarms."""
    stray: float = 15.0
    """Standard deviations by which a group of one class must lie away from all labels to be taken
    for poison; lower finds more, and false alarms."""
    belongs: float = 0.5
    """Mean probability of one other class that a probe must give a group for it to be taken for
    poison from that class; lower finds more, and false alarms."""
    trim: float = 0.2
    """Share of the poisoned group, nearest to the other group, that the pool is not drawn from."""
    sure: float = 0.99
    """Probability under a mixture above which a sample of the poisoned group may be drawn; the
    surer half of the group always may."""
    isolation_epochs: int = 20
    """Length of the isolation training."""
    isolation_gamma: float = 0.5
    """gamma: mean loss of a batch below which isolation ascends; 0 is plain cross-entropy."""
    isolation_lr: float = 0.1
    """Learning rate of the isolation training."""
    heads: int = 5
    """Heads trained side by side; their median decides."""
    alpha1: float = 1.0
    """alpha of anti-learning: weight of learning everything outside the pool."""
    beta1: float = 1000.0
    """beta of anti-learning: weight of unlearning the pool; higher finds more poison and forgives
    less impurity."""
    beta1_fallback: float = 99.0
    """beta that is tried where the head breaks down at beta1."""
    head_lr: float = 0.1
    """Learning rate of the heads, plain SGD."""
    head_lr_decay: bool = True
    """Let it fall linearly to 0 over the passes; the port keeps it."""
    head_clip: float | None = 10.0
    """Largest gradient norm of a head; None is the port's. At beta1 the first steps overshoot and
    take the label's clean samples along."""
    head_batch_size: int = 512
    """Samples a step."""
    head_epochs: int = 30
    """Passes; the port's 10 leave more of the label's clean samples behind, many more let the head
    tell the pool from the other poison."""
    threshold: float = 0.1
    """A sample is poison where the head gives its label less than this ..."""
    relative: bool = True
    """... share of what the poisoned model gave it. False: less than this probability, as in the
    port (0.0103, its SCE > 20.53)."""
    breakdown: float = 0.3
    """Loss of accuracy on unflagged samples, against the poisoned model, at which a head is
    refused. At 1 no split is, not even one that leaves a label without clean samples."""
    loss: Literal["cce", "both", "gga"] = "cce"
    """Unlearning loss: cce, gga (gradient ascent), or both = cce + tau gga."""
    alpha2: float = 1.0
    """alpha of unlearning: weight of the clean part."""
    beta2: float = 1.0
    """beta of unlearning: weight of the poisoned part."""
    tau: float = 0.2
    """tau: share of ascent in `both`."""
    ascent_cap: float | None = -math.log(0.0103)
    """Cross-entropy at which the ascent of `both` stops pushing; None never stops, as in the
    port."""
    epochs: int = 20
    """Passes of unlearning."""
    lr: float = 1e-4
    """Learning rate of unlearning."""
    lr_decay: bool = False
    """Let it fall linearly to 0 over the unlearning: a large rate ends where its last step happened
    to lead."""
    momentum: float = 0.9
    """SGD's momentum in unlearning."""
    weight_decay: float = 5e-4
    """L2 penalty in unlearning."""
    batch_size: int = 128
    """Images a step in unlearning, and in the training of `isolation`."""
    recovery_epochs: int = 0
    """Passes in which what was flagged is learned with the labels that the unlearned model reads in
    it (ours): triggered images get their true label again. 0 stops after unlearning, as
    published."""

    RANGES: ClassVar[dict[str, str]] = {
        "pool_rate": "(0, 1]",
        "stray": "> 0",
        "belongs": "(0, 1]",
        "trim": "[0, 1)",
        "sure": "(0, 1)",
        "isolation_epochs": ">= 0",
        "isolation_lr": ">= 0",
        "heads": ">= 1",
        "head_lr": ">= 0",
        "head_batch_size": ">= 1",
        "head_epochs": ">= 0",
        "head_clip": "> 0",
        "threshold": "(0, 1)",
        "epochs": ">= 0",
        "lr": ">= 0",
        "momentum": ">= 0",
        "weight_decay": ">= 0",
        "batch_size": ">= 1",
        "recovery_epochs": ">= 0",
    }


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module | None:
    def split() -> dict[str, Tensor]:
        if config.subtask == "unlearning":
            raise UserError(
                "--subtask unlearning starts from a split, and there is none yet: run --subtask"
                " anti_learning first"
            )
        flagged, one_class = find_poison(view, config, run)
        return {"flagged": flagged, "one_class": torch.tensor(one_class)}

    found = run.cached("split", split)
    flagged, one_class = found["flagged"], bool(found["one_class"])
    if config.subtask == "anti_learning":
        return None
    if not flagged.any():
        return view.load_model()
    model = unlearn(view, flagged, config, run)
    note_what_stays(model, view.train, flagged, run)
    return (
        recover(model, view, flagged, one_class, config, run) if config.recovery_epochs else model
    )


def find_poison(
    view: DefenderView, config: Config, run: Run, pool: Tensor | None = None
) -> tuple[Tensor, bool]:
    """Steps 1 to 3: bool (N,), True for what is taken to be poison; all False where a guard says
    so. And whether it was found as images of one class.

    `pool`, bool (N,), is found unless given.
    """
    head = linear(view.load_model().get_classifier())
    train = to_device(view.train, run.device)
    features = extract(view.load_model(), train, run)
    one_class = False
    if pool is None:
        pool, one_class = find_pool(view, view.load_model(), train, features, config, run)
    if not pool.any():
        run.report_split(pool)
        return pool, False
    run.report_split(pool, "pool")

    for beta in dict.fromkeys((config.beta1, config.beta1_fallback)):
        log_p = anti_learn(features, pool, head, beta, config, run)
        flagged = lost_label(log_p, features, config)
        lost = (
            1.0
            if flagged.all()
            else accuracy(features.logits, features.labels, ~flagged)
            - accuracy(log_p, features.labels, ~flagged)
        )
        if lost <= config.breakdown:
            if not flagged.any():
                run.note(
                    f"no poison found: at beta {beta:g} the anti-learned head takes no sample's"
                    " label away, so the model is returned as it was"
                )
            break
        run.note(
            f"beta {beta:g}: the anti-learned head loses {lost:.2f} of the accuracy on what it"
            " calls clean, so its split is refused"
        )
    else:
        flagged = torch.zeros_like(flagged)
        run.note(
            "no poison found: every anti-learned head broke down, so the model is returned as"
            " it was"
        )
    emptied = set(features.labels.tolist()) - set(features.labels[~flagged].tolist())
    if emptied and config.breakdown < 1:
        run.note(
            f"the split would leave {len(emptied)} label(s) without a clean sample: the model is"
            " returned as it was"
        )
        flagged = torch.zeros_like(flagged)
    if flagged.any():
        counts = torch.bincount(features.labels[flagged], minlength=view.num_classes).tolist()
        run.note(
            "flagged by label: "
            + ", ".join(f"{label}: {count}" for label, count in enumerate(counts) if count)
        )
    run.report_split(flagged, suspicion=doubt(log_p, features, config))
    return flagged.cpu(), one_class


def lost_label(log_p: Tensor, features: Features, config: Config) -> Tensor:
    """Step 3: bool (N,), where the anti-learned log p (N, K) gives a sample's own label too
    little."""
    return doubt(log_p, features, config) > -math.log(config.threshold)


def doubt(log_p: Tensor, features: Features, config: Config) -> Tensor:
    """float (N,): how much less, as a log, the anti-learned head believes in a sample's label than
    the poisoned model did."""
    before = cross_entropy(features.logits, features.labels) if config.relative else 0
    # Not renormalised over the classes: heads that send a sample to different ones leave every
    # median low.
    return -log_p.gather(1, features.labels.unsqueeze(1)).squeeze(1) - before


def accuracy(logits: Tensor, labels: Tensor, among: Tensor) -> float:
    """Share of the samples in the bool mask `among` that get their label."""
    return (logits.argmax(1) == labels)[among].float().mean().item()


# --- 1. pool


def find_pool(
    view: DefenderView,
    model: Classifier,
    train: Split,
    features: Features,
    config: Config,
    run: Run,
) -> tuple[Tensor, bool]:
    """bool (N,): at most pool_rate N samples that are almost surely poison; none where no label
    looks poisoned. And whether they show one class."""
    size = max(1, round(config.pool_rate * len(train)))
    if config.pool == "bimodal":
        return bimodal_pool(features, size, view.num_classes, config, run)
    if config.pool == "isolation":
        model = isolate(view, train, config, run)
        features = extract(model, train, run)
    losses = F.cross_entropy(features.logits, features.labels, reduction="none")
    return _mask(losses.argsort()[:size], len(train)), False


class Label(NamedTuple):
    """The samples that one label was given to."""

    number: int
    members: Tensor
    """int64 (n,): which they are."""
    samples: Tensor
    """float64 (D, n): their early features, whitened."""
    x: Tensor
    """float64 (n,): these along the direction in which they vary most."""
    means: Tensor
    """float64 (D, at most K - 1): the means of the other labels, in the order of their numbers."""
    others: Tensor
    """float64 (at most K - 1,): where these lie along that direction."""
    bimodality: float
    mixed: list[Tensor]
    """`mixture_groups` of them."""


def bimodal_pool(
    features: Features, size: int, num_classes: int, config: Config, run: Run
) -> tuple[Tensor, bool]:
    """Ours. A label given to two kinds of images has features in two groups; poison is the one of
    many classes, or of another, or where none lies."""
    labels, small = [], []
    for number, (samples, means) in enumerate(whiten(features.early, features.labels, num_classes)):
        if samples.shape[1] < ENOUGH:
            small.append(number)
            continue
        direction = strangest_direction(samples)
        x = direction @ samples
        members = (features.labels == number).nonzero().squeeze(1)
        labels.append(
            Label(
                number,
                members,
                samples,
                x,
                means,
                direction @ means,
                sarle(x),
                mixture_groups(samples, x),
            )
        )
    if small:
        run.note(
            f"{len(small)} labels have less than {ENOUGH} samples: no pool is sought among those"
        )
    many = sum(label.bimodality > PLAIN for label in labels) > num_classes // 2
    chosen = []
    for label in labels:
        poison, varied = (
            in_halves(label, features, many, config, run)
            if label.bimodality > config.bimodality
            else (None, [])
        )
        if not many:
            mixed = in_mixture(label, features, max([config.variety, *varied]), config, run)
            poison = poison if mixed is None else mixed
        if poison is not None:
            chosen.append(label.members[poison])
    # Clean-label poison shows one class; asked last, because a style may lie far away, too
    if not chosen:
        placed = [
            (label, out_of_place(label, config, run))
            for label in labels
            if label.bimodality > PLACED
        ]
        chosen = [label.members[poison] for label, poison in placed if poison is not None]
    one_class = not chosen
    if one_class:  # so does poison from one source class
        torn = [
            (label, from_one_class(label, features, config, run))
            for label in labels
            if len(label.means.T) >= FEW
        ]
        chosen = [label.members[poison] for label, poison in torn if poison is not None]
    if not chosen:
        groups = "of images of many classes or of one other class, or away from all labels"
        run.note(
            f"no poison found: no label has a group {groups}, so the model is returned as it was"
        )
        return torch.zeros(len(features.labels), dtype=torch.bool), False
    return draw_pool(torch.cat(chosen), size, len(features.labels), run), one_class


def draw_pool(found: Tensor, size: int, n: int, run: Run) -> Tensor:
    """bool (n,): at most `size` of what was found, int64 (M,), and at most half of it: the rest
    stays out, to be found."""
    # Drawn at random: the most extreme ones would be purer, but unlike the rest.
    drawn = torch.randperm(len(found), generator=run.generator)[
        : min(size, max(1, len(found) // 2))
    ].to(found.device)
    return _mask(found[drawn], n)


def in_halves(
    label: Label, features: Features, many: bool, config: Config, run: Run
) -> tuple[Tensor | None, list[float]]:
    """Where one of a label's two groups shows many classes, bool (n,): its samples that lie apart
    from the other; and the variety of both."""
    upper = two_means(label.x)
    halves = sorted((upper, ~upper), key=lambda half: int(half.sum()))
    sizes = " and ".join(str(int(half.sum())) for half in halves)
    what = (
        f"label {label.number} has features in two groups (bimodality {label.bimodality:.2f}) of"
        f" {sizes} samples"
    )
    if many:  # all-to-all: each label has images of one other class, fewer than its own
        run.note(f"{what}, as most labels have, so the smaller is taken for poison")
        return outer(label.x, halves[0], config), []
    varied = variety(
        features.spatial,
        [label.members[half] for half in halves],
        features.labels,
        label.number,
        run.generator,
    )
    what += (
        f", in which early features show {varied[0]:.2f} and {varied[1]:.2f} of the variety of the"
        " other labels"
    )
    if max(varied) > config.variety:
        run.note(f"{what}: the group with more is taken for poison")
        return outer(label.x, halves[varied.index(max(varied))], config), varied
    if label.bimodality > PLAIN:
        run.note(
            f"{what}: too little for images of many classes, so these are taken for two styles"
        )
    return None, varied


def out_of_place(label: Label, config: Config, run: Run) -> Tensor | None:
    """Where one of a label's two groups lies where no label does, bool (n,): its samples that lie
    apart from the other."""
    upper = two_means(label.x)
    halves = [upper, ~upper]
    far = [stray(label.x[half], label.others) for half in halves]
    if max(far) <= config.stray:
        return None
    away = f"{far[0]:.0f} and {far[1]:.0f} standard deviations from where labels lie"
    what = f"label {label.number} has two groups (bimodality {label.bimodality:.2f}), {away}"
    run.note(f"{what}: no class lies where the farther one does, so it is taken for poison")
    return outer(label.x, halves[far.index(max(far))], config)


def from_one_class(label: Label, features: Features, config: Config, run: Run) -> Tensor | None:
    """Where the fewer of a label's samples lie together and look like one other class, bool (n,):
    poison of a trigger that works on one class only.

    Two views must agree on the class. Its samples are nearer, on average, than the rest of the
    label, and a probe of the other labels names it. Images of a third class that carry the trigger
    with their true label stay near their own, whatever the probe thinks.
    """
    known = features.labels.unique()
    known = known[known != label.number]
    upper = two_means(label.x)
    groups: list[tuple[Tensor, Tensor | None]] = [
        (upper, None),
        (~upper, None),
        *((p > 0.5, p) for p in label.mixed),
    ]
    ask, most, found = None, config.belongs, None
    for group, p in groups:
        size = int(group.sum())
        # Not the more: a probe takes a class that it does not know, as this label's, for the one
        # that it resembles.
        if not TOGETHER <= size <= len(group) // 2 or (size < MANY and label.bimodality <= TORN):
            continue
        centre, rest = label.samples[:, group].mean(1), label.samples[:, ~group].mean(1)
        distance, nearest = (label.means - centre[:, None]).norm(dim=0).min(0)
        if distance >= (centre - rest).norm():
            continue
        ask = ask or probe(features.spatial, features.labels, label.number, run.generator)
        assert ask is not None, "there are other labels"
        seen = features.spatial[label.members[group]].float()
        belief, source = ask((seen - ask.mean) / ask.std).mean(0).max(0)
        if belief > most and source == known[nearest]:
            most, found = (
                belief.item(),
                outer(label.x, group, config) if p is None else surely(p, config),
            )
            said = (
                f"label {label.number} has {size} samples that lie together and look like class"
                f" {int(source)} ({most:.2f}) more than like the rest"
            )
    if found is not None:
        run.note(f"{said}: they are taken for poison from that class")
    return found


def outer(x: Tensor, group: Tensor, config: Config) -> Tensor:
    """bool (n,): a group's samples without the share `trim` that lies nearest to the others along
    x."""
    apart = (x - x[~group].mean()).abs()
    return group & (apart >= apart[group].quantile(config.trim))


def in_mixture(
    label: Label, features: Features, least: float, config: Config, run: Run
) -> Tensor | None:
    """Where a group that a mixture tells apart shows more variety than `least`, bool (n,): its
    samples that surely belong to it."""
    groups = label.mixed
    varied = (
        variety(
            features.spatial,
            [label.members[p > 0.5] for p in groups],
            features.labels,
            label.number,
            run.generator,
        )
        if groups
        else []
    )
    if max(varied, default=0.0) <= least:
        return None
    p = groups[varied.index(max(varied))]
    what = (
        f"{int((p > 0.5).sum())} samples that lie together and show {max(varied):.2f} of the"
        " variety of the other labels"
    )
    run.note(
        f"label {label.number} has {what}: a mixture tells them apart, and they are taken for"
        " poison"
    )
    return surely(p, config)


def surely(p: Tensor, config: Config) -> Tensor:
    """bool (n,): what belongs to a group with the probability `sure` or, if that is less than half
    of the group, its surer half. p: float (n,)."""
    return p >= p[p > 0.5].median().clamp_max(config.sure)


def whiten(x: Tensor, labels: Tensor, num_classes: int) -> list[tuple[Tensor, Tensor]]:
    """For each label, from its own mean and in units of how the samples of the *other* labels vary:
    its samples (D, n_k) and the means of the other labels (D, at most K - 1), float64.

    x: (N, D). After the statistic of SCAn (Demon in the Variant, Tang et al., USENIX Security
    2021): what people, poses and light do to an image is alike in all classes; what a trigger does
    is not.
    """
    x = x.double()
    means = [x[labels == label].mean(0) for label in range(num_classes)]
    centred = [x[labels == label] - mean for label, mean in enumerate(means)]
    total, found = x.new_zeros(x.shape[1], x.shape[1]), []
    for part in centred:
        total += part.T @ part  # computed anew below: a thousand of them would fill the memory
    for label, part in enumerate(centred):
        if len(part) == 0 or len(part) == len(x):
            found.append((torch.zeros_like(part.T), x.new_zeros(x.shape[1], 0)))
            continue
        others = (total - part.T @ part) / (len(x) - len(part))
        others += (
            0.1
            * others.diagonal().mean().clamp_min(1e-12)
            * torch.eye(len(others), dtype=x.dtype, device=x.device)
        )
        root = torch.linalg.cholesky(others)
        elsewhere = torch.stack(
            [means[k] - means[label] for k in range(num_classes) if k != label and len(centred[k])],
            1,
        )
        found.append(
            tuple(
                torch.linalg.solve_triangular(root, part, upper=False)
                for part in (part.T, elsewhere)
            )
        )
    return found


def strangest_direction(samples: Tensor) -> Tensor:
    """(D,): the direction of length 1 in which whitened samples (D, n) vary most."""
    return torch.linalg.eigh(samples @ samples.T).eigenvectors[:, -1]


def mixture_groups(samples: Tensor, x: Tensor) -> list[Tensor]:
    """Groups of any size, small ones too, sought from both ends of x (n,): for each the probability
    (n,) that a sample belongs to it.

    Two means cut a label with a tenth of poison in the middle of its clean part. A mixture of two
    normal distributions of one spread, along the line between their means, which turns with them,
    does not. samples: whitened, (D, n). It starts from the outermost twentieth.
    """
    found = []
    for end in (x, -x):
        p = (end >= end.quantile(0.95)).to(x.dtype) if len(x) else x
        for _ in range(100):
            p = p.clamp(1e-9, 1 - 1e-9)
            share, weights = p.mean(), torch.stack([p / p.sum(), (1 - p) / (1 - p).sum()])
            towards = samples @ (weights[0] - weights[1])
            along = towards @ samples / towards.norm()
            means = weights @ along
            square = (along - means[:, None]).square()
            variance = (p * square[0] + (1 - p) * square[1]).mean()
            p = (share.logit() + (square[1] - square[0]) / (2 * variance)).sigmoid()
        group = p > 0.5
        if group.any() and not group.all() and means[0] - means[1] > APART * variance.sqrt():
            found.append(p)
    return found


def stray(x: Tensor, others: Tensor) -> float:
    """How far the mean of a group lies from where the other labels' means `others` lie, in their
    standard deviations; 0 with too few of them."""
    return (
        ((x.mean() - others.mean()).abs() / others.std().clamp_min(1e-12)).item()
        if len(others) >= FEW
        else 0.0
    )


def variety(
    x: Tensor, groups: list[Tensor], labels: Tensor, label: int, generator: torch.Generator
) -> list[float]:
    """How many classes each group of one label shows: 0 for one class, 1 for as many as there are
    among the samples of the other labels.

    x: (N, D) features from which the content of an image can be told; groups: int64 indices. A
    linear probe learns to tell the *other* labels apart. The mutual information of image and answer
    (answers that are sure, and differ) in a group, against that among the other labels. Each group
    is moved to their mean first, because a trigger that shifts all of its images must not count as
    content.
    """
    ask = probe(x, labels, label, generator)
    if ask is None:
        return [0.0] * len(groups)
    most = information(ask(ask.known))
    answers = [ask(((part := x[group].float()) - part.mean(0)) / ask.std) for group in groups]
    return [
        information(answer) / most if len(answer) > 1 and most > 0 else 0.0 for answer in answers
    ]


class Probe(NamedTuple):
    """A linear classifier that knows all labels but one. Features in units of its own, float (n, D)
    -> probabilities (n, K)."""

    known: Tensor
    """float (n, D): what it learned from, in these units: less `mean`, over `std`."""
    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return (x @ self.weight.T + self.bias).softmax(1)


def probe(x: Tensor, labels: Tensor, label: int, generator: torch.Generator) -> Probe | None:
    """Learned from features x (N, D) of the other labels; None where these are less than two."""
    others = (labels != label).nonzero().squeeze(1)
    if len(labels[others].unique()) < 2:
        return None
    others = others[torch.randperm(len(others), generator=generator)[:PROBED].to(others.device)]
    known = x[others].float()
    mean, std = known.mean(0), known.std(0).clamp_min(1e-6)
    known = (known - mean) / std
    weight = known.new_zeros(int(labels.max()) + 1, x.shape[1], requires_grad=True)
    bias = known.new_zeros(len(weight), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=40, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = (
            F.cross_entropy(known @ weight.T + bias, labels[others]) + 0.01 * weight.square().sum()
        )
        found.backward()
        return found

    optimizer.step(loss)
    return Probe(known, mean, std, weight.detach(), bias.detach())


def information(p: Tensor) -> float:
    """Mutual information in nats between a sample and the answer on it. (n, K) probabilities."""
    entropy = torch.special.entr
    return (entropy(p.mean(0)).sum() - entropy(p).sum(1).mean()).item()


def sarle(x: Tensor) -> float:
    """Sarle's bimodality coefficient (skewness^2 + 1) / kurtosis: 1 for two points, 5/9 uniform,
    1/3 normal."""
    if len(x) < 4:
        return 0.0
    x = x - x.mean()
    variance = x.square().mean()
    if variance <= 0:
        return 0.0
    skewness, kurtosis = (x**3).mean() / variance**1.5, (x**4).mean() / variance**2
    return ((skewness.square() + 1) / kurtosis).item()


def two_means(x: Tensor) -> Tensor:
    """bool (n,): the upper of the two groups with the least squared distance to their means,
    exactly (one dimension)."""
    ordered = x.sort().values
    n = len(x)
    below = torch.arange(1, n, device=x.device)
    sums = ordered.cumsum(0)
    between = sums[:-1].square() / below + (sums[-1] - sums[:-1]).square() / (n - below)
    return x > ordered[between.argmax()]


def isolate(view: DefenderView, train: Split, config: Config, run: Run) -> Classifier:
    """ABL's isolation (Li et al., NeurIPS 2021): train from scratch, ascending where the loss of a
    batch is below gamma.

    As in its code. Its formula holds each sample's own loss at gamma, the poison's too, which is
    then no lower than others'.
    """
    model = view.new_model()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.isolation_lr, momentum=0.9, weight_decay=5e-4, fused=True
    )
    forward = Forward(
        model.train(),
        run,
        train,
        config.isolation_epochs * (len(train) // config.batch_size),
        config.batch_size,
    )
    for _ in run.epochs("isolate", config.isolation_epochs, isolated=model, optimizer=optimizer):
        model.train()
        for batch in batches(
            train,
            config.batch_size,
            device=run.device,
            generator=run.generator,
            augment=view.augment,
            drop_last=True,
        ):
            loss = F.cross_entropy(forward(batch.images).float(), batch.labels)
            run.step(optimizer, (loss.detach() - config.isolation_gamma).sign() * loss)
    return model


# --- 2. anti-learning


def linear(head: nn.Module) -> nn.Linear:
    if not isinstance(head, nn.Linear):
        raise UserError(f"DAU needs a model that ends in a linear layer, got {type(head).__name__}")
    return head


def anti_learn(
    features: Features, pool: Tensor, head: nn.Module, beta: float, config: Config, run: Run
) -> Tensor:
    """log p (N, K): the median over heads that start as the model's own, learn the samples outside
    the pool and unlearn the pool."""
    n, num_classes = features.logits.shape
    head, pool = linear(head), pool.to(features.labels.device)
    weight = head.weight.detach().float().expand(config.heads, -1, -1).clone().requires_grad_()
    bias = head.bias.detach().float().expand(config.heads, -1).clone().requires_grad_()
    share = n / num_classes / int(pool.sum())  # a pool smaller than a class gets the mass of one
    odds = torch.where(pool.cpu(), max(1.0, share), 1.0).expand(config.heads, -1)
    total = config.head_epochs * math.ceil(n / config.head_batch_size)
    done = 0
    for _ in range(config.head_epochs):
        order = torch.multinomial(odds, n, replacement=share > 1, generator=run.generator).to(
            features.labels.device
        )
        for index in order.split(config.head_batch_size, dim=1):
            labels, poisoned = features.labels[index], pool[index]
            logits = torch.einsum("hbd,hkd->hbk", features.pooled[index], weight) + bias[:, None]
            losses = (
                config.alpha1 * cross_entropy(logits, labels) * ~poisoned
                + beta * cce(logits, labels) * poisoned
            )
            steps = torch.autograd.grad(losses.mean(1).sum(), [weight, bias])
            with torch.no_grad():
                norm = (steps[0].square().sum((1, 2)) + steps[1].square().sum(1)).sqrt()
                clipped = (
                    torch.ones_like(norm)
                    if config.head_clip is None
                    else (config.head_clip / norm).clamp_max(1)
                )
                scale = config.head_lr * (1 - done / total if config.head_lr_decay else 1) * clipped
                weight -= scale[:, None, None] * steps[0]
                bias -= scale[:, None] * steps[1]
            done += 1
    with torch.no_grad():
        # All heads' answers on all samples may be too much for the memory
        parts = features.pooled.split(ANSWERED)
        return torch.cat(
            [
                torch.stack(
                    [(x @ w.T + b).log_softmax(1) for w, b in zip(weight, bias, strict=True)]
                )
                .median(0)
                .values
                for x in parts
            ]
        )


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p_y for each sample. (..., K), (...) -> (...)."""
    return logits.logsumexp(-1) - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def cce(logits: Tensor, labels: Tensor) -> Tensor:
    """-log(1 - p_y) for each sample: complementary cross-entropy, pushing hardest where the label
    is believed most. (..., K), (...) -> (...)."""
    others = logits.scatter(-1, labels.unsqueeze(-1), -math.inf)
    return logits.logsumexp(-1) - others.logsumexp(-1)


# --- 4. unlearning, 5. recovery


def unlearn(view: DefenderView, flagged: Tensor, config: Config, run: Run) -> nn.Module:
    """Step 4, from the poisoned model."""
    return descend(
        "unlearn",
        config.epochs,
        view.load_model(),
        view.train,
        torch.arange(len(flagged)),
        flagged,
        view,
        config,
        run,
    )


def note_what_stays(model: nn.Module, train: Split, flagged: Tensor, run: Run) -> None:
    """Say where step 4 did little, which a defender without triggered images sees nowhere else."""
    poisoned = train.subset(flagged.nonzero().squeeze(1).cpu())
    with paused():
        share = (
            (predictions(model, poisoned, run) == poisoned.labels.to(run.device))
            .double()
            .mean()
            .item()
        )
    if share > STAYED:
        run.note(
            f"{share:.0%} of the {len(poisoned):,} flagged samples still get their label: little"
            " was unlearned; raise --lr, or --epochs"
        )


def recover(
    model: nn.Module, view: DefenderView, flagged: Tensor, one_class: bool, config: Config, run: Run
) -> nn.Module:
    """Step 5, from the unlearned model: nothing is unlearned any more, and flagged samples have the
    labels that were read in them."""
    labels = run.cached(
        "labels",
        lambda: {"labels": labels_without_trigger(model, view.train, flagged, one_class, run)},
    )["labels"]
    # What still shows its own label is clean, or poison of the target class. Nobody can tell which,
    # so it teaches nothing.
    index = (~flagged | (labels != view.train.labels.cpu())).nonzero().squeeze(1)
    train = dataclasses.replace(view.train, labels=labels)
    return descend(
        "recover",
        config.recovery_epochs,
        model,
        train,
        index,
        torch.zeros_like(flagged),
        view,
        config,
        run,
    )


def descend(
    stage: str,
    epochs: int,
    model: nn.Module,
    train: Split,
    index: Tensor,
    poisoned: Tensor,
    view: DefenderView,
    config: Config,
    run: Run,
) -> nn.Module:
    """Passes over the samples of `index`, int64 (M,), that unlearn the poisoned ones, bool (N,),
    and learn the others."""
    train, poisoned = to_device(train, run.device), poisoned.to(run.device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True,
    )
    steps = epochs * math.ceil(len(index) / config.batch_size)
    scheduler = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1.0, 0.0 if config.lr_decay else 1.0, total_iters=max(1, steps)
    )
    forward = Forward(model.train(), run, train, steps, config.batch_size)
    for _ in run.epochs(stage, epochs, model=model, optimizer=optimizer, scheduler=scheduler):
        model.train()
        order = index[torch.randperm(len(index), generator=run.generator)]
        for batch in batches(
            train,
            config.batch_size,
            device=run.device,
            generator=run.generator,
            augment=view.augment,
            order=order,
        ):
            logits = forward(batch.images).float()
            run.step(
                optimizer, unlearning_loss(logits, batch.labels, poisoned[batch.index], config)
            )
            scheduler.step()
    return model


def labels_without_trigger(
    model: nn.Module, train: Split, flagged: Tensor, one_class: bool, run: Run
) -> Tensor:
    """int64 (N,) on the CPU: the given labels, for flagged samples the unlearned model's answers
    under batch statistics of their own.

    A trigger shifts the features of all images that carry it alike. Batch normalisation with the
    flagged samples' own means and variances takes that shift away (as AdaBN does between data sets:
    Li et al., 2016, https://arxiv.org/abs/1603.04779), and what the images show comes out; not
    where they show one class, which would go with it.
    """
    index = flagged.nonzero().squeeze(1).cpu()
    reader = copy.deepcopy(model)
    if len(index) > 1 and not one_class:  # of a single image there are no statistics
        drawn = index[torch.randperm(len(index), generator=run.generator)]
        # Batches alike, because their statistics count alike
        size = math.ceil(len(drawn) / math.ceil(len(drawn) / READ))
        with run.autocast():
            update_bn(
                (batch.images for batch in batches(train, size, device=run.device, order=drawn)),
                reader,
            )
    labels = train.labels.cpu().clone()
    labels[index] = predictions(reader, train.subset(index), run).cpu()
    return labels


def unlearning_loss(logits: Tensor, labels: Tensor, poisoned: Tensor, config: Config) -> Tensor:
    """alpha CE on the clean part plus beta times the unlearning loss on the poisoned part, both
    over the whole batch."""
    learned = cross_entropy(logits, labels)
    if config.loss == "gga":
        unlearned = -learned
    elif config.loss == "both":
        ascent = learned if config.ascent_cap is None else learned.clamp_max(config.ascent_cap)
        unlearned = cce(logits, labels) - config.tau * ascent
    else:
        unlearned = cce(logits, labels)
    return torch.where(poisoned, config.beta2 * unlearned, config.alpha2 * learned).mean()


def _mask(index: Tensor, size: int) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[index.cpu()] = True
    return mask


if __name__ == "__main__":
    raise SystemExit(main(__file__))
