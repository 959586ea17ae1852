"""Search for the first poison: a small set of training samples that is almost pure poison.

`find_pool` offers three ways. Training samples of lowest loss, under the poisoned model or after
ABL's isolation (`isolate`), are known from the literature; `bimodal_pool` is ours.
A label given to two kinds of images has features in two groups. For each label, `whiten` expresses
features in units of how the samples of the other labels vary, and the search looks along the
direction of largest variance. Four tests decide whether a group of a label's samples is poison:

  1. `in_halves`: one of two halves shows images of many classes.
  2. `in_mixture`: so does a group of any size, separated by a mixture of two normal distributions.
  3. `out_of_place`: one of two halves lies where no other class does (clean-label poison).
  4. `from_one_class`: a group looks like one other class (a trigger for one source class).

Test 3 runs only where tests 1 and 2 find nothing in any label, test 4 only where test 3 finds
nothing either. docs/methods/dau.md gives the reasons, docs/methods/dau_experiments.md the numbers.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Split, batches
from .engine import Forward
from .features import Features, extract
from .models import Classifier
from .record import DefenderView
from .run import Run


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Settings of the search. A method inherits these fields, which makes them its flags."""

    pool: Literal["bimodal", "isolation", "model_loss"] = "bimodal"
    """How the first poison is found: bimodal: a label whose features fall into two groups (ours);
    isolation: lowest loss after ABL's training; model_loss: lowest loss of the model."""
    pool_rate: float = 0.01
    """|P0| / N. Larger pools lead anti-learning better, but contain more of what it should find."""
    isolation_epochs: int = 20
    """Passes of the isolation training."""
    isolation_gamma: float = 0.5
    """gamma: mean loss of a batch below which isolation ascends; 0 is plain cross-entropy."""
    isolation_lr: float = 0.1
    """Learning rate of the isolation training."""
    bimodality: float = 0.45
    """Bimodality (Sarle's coefficient: 1/3 normal, 5/9 uniform, 1 two points) above which 2-means
    splits a label. Lower values try more labels. Does not affect the mixture test."""
    clear_bimodality: float = 0.7
    """Bimodality at which a label has two groups beyond doubt. Where more than half of the labels
    exceed it, the attack is taken for all-to-all; lower values do so more readily."""
    place_bimodality: float = 0.6
    """Bimodality above which the test for place looks at a label. Clean labels of CIFAR-10 reach
    0.57, a uniform distribution 5/9; lower values test more labels."""
    label_samples: int = 20
    """Samples that a label must have to be searched. With fewer, chance looks like two groups: ten
    points in many dimensions exceed a bimodality of 0.45."""
    variety: float = 0.6
    """Variety of classes a group must show to be poison, as a share of the other labels' variety.
    Lower values find more poison and raise more false alarms."""
    separation: float = 2.0
    """Distance between the two means of a mixture, in its standard deviations, below which they are
    one group. Lower values find more groups."""
    stray: float = 15.0
    """Standard deviations by which a group of one class must lie away from all labels to be poison.
    Lower values find more poison and raise more false alarms."""
    belongs: float = 0.5
    """Mean probability of one other class that a probe must give a group for it to be poison from
    that class. Lower values find more poison and raise more false alarms."""
    group_samples: int = 5
    """Samples a group must have to be tested for one source class."""
    source_samples: int = 100
    """Samples from which on a group is tested for one source class whatever its label's bimodality:
    so many do not look like another class by chance."""
    source_bimodality: float = 0.75
    """Bimodality a label must exceed for its smaller groups to be tested for one source class.
    Lower values find less poison of one class by chance only."""
    other_labels: int = 5
    """Other labels needed to know where labels lie, and for a probe's answer to mean one class.
    With fewer, the tests for place and for one source class are skipped."""
    probe_samples: int = 20_000
    """Largest number of samples that a probe is trained on."""
    trim: float = 0.2
    """Share of a poisoned half, nearest to the other half, that the pool is not drawn from. Higher
    values make the pool purer and less typical."""
    sure: float = 0.99
    """Probability under a mixture above which a sample of the poisoned group may enter the pool;
    the surer half of the group always may."""

    RANGES: ClassVar[dict[str, str]] = {
        "pool_rate": "(0, 1]",
        "isolation_epochs": ">= 0",
        "isolation_lr": ">= 0",
        "label_samples": ">= 1",
        "separation": "> 0",
        "stray": "> 0",
        "belongs": "(0, 1]",
        "group_samples": ">= 1",
        "source_samples": ">= 0",
        "other_labels": ">= 2",
        "probe_samples": ">= 1",
        "trim": "[0, 1)",
        "sure": "(0, 1)",
    }


class Label(NamedTuple):
    """The samples of one label, as the tests see them."""

    number: int
    members: Tensor
    """int64 (n,): their positions in the training set."""
    samples: Tensor
    """float64 (D, n): their early features, whitened."""
    x: Tensor
    """float64 (n,): `samples` along the direction in which they vary most."""
    means: Tensor
    """float64 (D, at most K - 1): the other labels' means, ordered by label."""
    others: Tensor
    """float64 (at most K - 1,): `means` along that direction."""
    bimodality: float
    """Sarle's coefficient of x."""
    mixed: list[Tensor]
    """`mixture_groups` of the samples."""


def find_pool(
    view: DefenderView,
    train: Split,
    features: Features,
    config: SearchConfig,
    batch_size: int,
    run: Run,
) -> tuple[Tensor, bool]:
    """Find at most pool_rate N samples that are almost surely poison.

    Args:
        train: the N training samples, on the run's device.
        features: of all of them, by the poisoned model.
        batch_size: images a step in the training of `isolation`.

    Returns:
        bool (N,), all False where no label looks poisoned; and whether they may show one class.
    """
    size = max(1, round(config.pool_rate * len(train)))
    if config.pool == "bimodal":
        return bimodal_pool(features, size, view.num_classes, config, run)

    # Lowest loss, of the poisoned model or of one that was trained for this alone.
    if config.pool == "isolation":
        model = isolate(
            view,
            train,
            config.isolation_epochs,
            batch_size,
            config.isolation_lr,
            config.isolation_gamma,
            run,
        )
        features = extract(model, train, run)
    losses = F.cross_entropy(features.logits, features.labels, reduction="none")
    return mask(losses.argsort()[:size], len(train)), False


def isolate(
    view: DefenderView,
    train: Split,
    epochs: int,
    batch_size: int,
    lr: float,
    gamma: float,
    run: Run,
) -> Classifier:
    """Train a new model, ascending the loss of each batch where its mean is below gamma.

    ABL's isolation (Anti-Backdoor Learning, Y. Li et al., NeurIPS 2021,
    https://arxiv.org/abs/2110.11571), after which poison has the lowest loss. As in ABL's code: its
    formula keeps each sample's own loss at gamma, the poison's too, which is then no lower than
    others'.
    """
    model = view.new_model()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, fused=True
    )
    forward = Forward(model.train(), run, train, epochs * (len(train) // batch_size), batch_size)

    for _ in run.epochs("isolate", epochs, isolated=model, optimizer=optimizer):
        model.train()
        for batch in batches(
            train,
            batch_size,
            device=run.device,
            generator=run.generator,
            augment=view.augment,
            drop_last=True,
        ):
            # sign(L - gamma) L: what is learnt early is not learnt further.
            loss = F.cross_entropy(forward(batch.images).float(), batch.labels)
            run.step(optimizer, (loss.detach() - gamma).sign() * loss)
    return model


def bimodal_pool(
    features: Features, size: int, num_classes: int, config: SearchConfig, run: Run
) -> tuple[Tensor, bool]:
    """Find a small set of samples that are almost surely poison.

    Args:
        features: of all N training samples, by the poisoned model.
        size: largest number of samples to return.
        num_classes: K.

    Returns:
        bool (N,), all False where no label looks poisoned; and whether the poison may show one
        class only, which is what test 4 finds.
    """
    labels = examine(features, num_classes, config, run)
    chosen = of_many_classes(labels, features, num_classes, config, run)

    # Clean-label poison shows one class. A harmless style may lie far away as well, so place is
    # tested only where no label shows variety.
    if not chosen:
        candidates = [label for label in labels if label.bimodality > config.place_bimodality]
        placed = [(label, out_of_place(label, config, run)) for label in candidates]
        chosen = [label.members[poison] for label, poison in placed if poison is not None]

    # Poison from one source class shows one class, too.
    one_class = not chosen
    if one_class:
        candidates = [label for label in labels if len(label.means.T) >= config.other_labels]
        torn = [(label, from_one_class(label, features, config, run)) for label in candidates]
        chosen = [label.members[poison] for label, poison in torn if poison is not None]

    # A note, so that a reader of the result knows why nothing was done.
    if not chosen:
        groups = "of images of many classes or of one other class, or away from all labels"
        run.note(
            f"no poison found: no label has a group {groups}, so the model is returned as it was"
        )
        return torch.zeros(len(features.labels), dtype=torch.bool), False
    return draw_pool(torch.cat(chosen), size, len(features.labels), run), one_class


def examine(features: Features, num_classes: int, config: SearchConfig, run: Run) -> list[Label]:
    """Compute what the tests need of each label that has enough samples."""
    labels, small = [], []
    for number, (samples, means) in enumerate(whiten(features.early, features.labels, num_classes)):
        if samples.shape[1] < config.label_samples:
            small.append(number)
            continue

        # Along one direction all tests see numbers, and 2-means is exact.
        direction = strangest_direction(samples)
        x = direction @ samples
        labels.append(
            Label(
                number=number,
                members=(features.labels == number).nonzero().squeeze(1),
                samples=samples,
                x=x,
                means=means,
                others=direction @ means,
                bimodality=sarle(x),
                mixed=mixture_groups(samples, x, config.separation),
            )
        )

    if small:
        run.note(
            f"{len(small)} labels have less than {config.label_samples} samples: no pool is sought"
            " among those"
        )
    return labels


def of_many_classes(
    labels: list[Label], features: Features, num_classes: int, config: SearchConfig, run: Run
) -> list[Tensor]:
    """Apply tests 1 and 2 to all labels; int64 positions of what is poison, a tensor a label."""
    clear = sum(label.bimodality > config.clear_bimodality for label in labels)
    all_to_all = clear > num_classes // 2
    chosen = []
    for label in labels:
        poison: Tensor | None = None
        varied: list[float] = []
        if label.bimodality > config.bimodality:
            poison, varied = in_halves(label, features, all_to_all, config, run)

        # A group of the mixture must show more variety than both halves to take their place.
        if not all_to_all:
            mixed = in_mixture(label, features, max([config.variety, *varied]), config, run)
            poison = poison if mixed is None else mixed

        if poison is not None:
            chosen.append(label.members[poison])
    return chosen


def draw_pool(found: Tensor, size: int, n: int, run: Run) -> Tensor:
    """Draw a pool from what was found, at most half of it: the rest stays outside, to be detected.

    Args:
        found: int64 (M,), positions of samples taken for poison.
        size: largest number of samples to draw.
        n: size of the training set.

    Returns:
        bool (n,).
    """
    # Drawn at random: the most extreme samples would be purer, but unlike the rest.
    order = torch.randperm(len(found), generator=run.generator)
    drawn = order[: min(size, max(1, len(found) // 2))].to(found.device)
    return mask(found[drawn], n)


def mask(index: Tensor, size: int) -> Tensor:
    """bool (size,) on the CPU: True at the positions of `index`."""
    result = torch.zeros(size, dtype=torch.bool)
    result[index.cpu()] = True
    return result


# --- the four tests


def in_halves(
    label: Label, features: Features, all_to_all: bool, config: SearchConfig, run: Run
) -> tuple[Tensor | None, list[float]]:
    """Test 1: look for images of many classes in one of a label's two halves.

    Args:
        all_to_all: most labels have two groups; the smaller half is then poison without a test.

    Returns:
        bool (n,), samples of the poisoned half that lie apart from the other one, or None; and the
        variety of both halves, empty where it was not computed.
    """
    upper = two_means(label.x)
    halves = sorted((upper, ~upper), key=lambda half: int(half.sum()))
    sizes = " and ".join(str(int(half.sum())) for half in halves)
    what = (
        f"label {label.number} has features in two groups (bimodality {label.bimodality:.2f}) of"
        f" {sizes} samples"
    )

    # All-to-all: each label has images of one other class, fewer than its own.
    if all_to_all:
        run.note(f"{what}, as most labels have, so the smaller is taken for poison")
        return outer(label.x, halves[0], config), []

    # Dirty-label poison comes from many classes, a label's own images from one.
    groups = [label.members[half] for half in halves]
    varied = variety(
        features.spatial,
        groups,
        features.labels,
        label.number,
        run.generator,
        limit=config.probe_samples,
    )
    what += (
        f", in which early features show {varied[0]:.2f} and {varied[1]:.2f} of the variety of the"
        " other labels"
    )
    if max(varied) > config.variety:
        run.note(f"{what}: the group with more is taken for poison")
        return outer(label.x, halves[varied.index(max(varied))], config), varied
    if label.bimodality > config.clear_bimodality:
        run.note(
            f"{what}: too little for images of many classes, so these are taken for two styles"
        )
    return None, varied


def in_mixture(
    label: Label, features: Features, least: float, config: SearchConfig, run: Run
) -> Tensor | None:
    """Test 2: look for more variety than `least` in a group of the mixture.

    Returns:
        bool (n,), samples that surely belong to the group, or None.
    """
    if not label.mixed:
        return None
    varied = variety(
        features.spatial,
        [label.members[p > 0.5] for p in label.mixed],
        features.labels,
        label.number,
        run.generator,
        limit=config.probe_samples,
    )
    if max(varied) <= least:
        return None

    # What surely belongs to the group with more variety than both halves.
    p = label.mixed[varied.index(max(varied))]
    what = (
        f"{int((p > 0.5).sum())} samples that lie together and show {max(varied):.2f} of the"
        " variety of the other labels"
    )
    run.note(
        f"label {label.number} has {what}: a mixture tells them apart, and they are taken for"
        " poison"
    )
    return surely(p, config)


def out_of_place(label: Label, config: SearchConfig, run: Run) -> Tensor | None:
    """Test 3: look for a half of a label that lies where no other label does.

    Returns:
        bool (n,), samples of that half that lie apart from the other one, or None.
    """
    # Where the other labels' means lie along the same direction is where content puts samples.
    upper = two_means(label.x)
    halves = [upper, ~upper]
    far = [stray(label.x[half], label.others, config.other_labels) for half in halves]
    if max(far) <= config.stray:
        return None

    away = f"{far[0]:.0f} and {far[1]:.0f} standard deviations from where labels lie"
    what = f"label {label.number} has two groups (bimodality {label.bimodality:.2f}), {away}"
    run.note(f"{what}: no class lies where the farther one does, so it is taken for poison")
    return outer(label.x, halves[far.index(max(far))], config)


def from_one_class(
    label: Label, features: Features, config: SearchConfig, run: Run
) -> Tensor | None:
    """Test 4: look for a group that looks like one other class, as poison of one source does.

    Two views must agree on the class: its mean is nearer to the group's than the rest of the label
    is, and a probe trained on the other labels classifies the group as that class. Images of a
    third class that carry the trigger with their true label stay near their own class, whatever the
    probe answers.

    Returns:
        bool (n,), samples that surely belong to the group, or None.
    """
    known = features.labels.unique()
    known = known[known != label.number]
    upper = two_means(label.x)
    groups: list[tuple[Tensor, Tensor | None]] = [(upper, None), (~upper, None)]
    groups += [(p > 0.5, p) for p in label.mixed]

    ask, most, found = None, config.belongs, None
    for group, p in groups:
        # A probe takes a class that it does not know, as this label's own, for the one that it
        # resembles. So the larger part of a label is never asked about.
        size = int(group.sum())
        if not config.group_samples <= size <= len(group) // 2:
            continue
        if size < config.source_samples and label.bimodality <= config.source_bimodality:
            continue

        # First view: another label's mean is nearer than the rest of this label.
        centre, rest = label.samples[:, group].mean(1), label.samples[:, ~group].mean(1)
        distance, nearest = (label.means - centre[:, None]).norm(dim=0).min(0)
        if distance >= (centre - rest).norm():
            continue

        # Second view: the probe names the same class, more surely than for the groups before.
        ask = ask or probe(
            features.spatial, features.labels, label.number, run.generator, config.probe_samples
        )
        assert ask is not None, "there are other labels"
        seen = features.spatial[label.members[group]].float()
        belief, source = ask((seen - ask.mean) / ask.std).mean(0).max(0)
        if belief > most and source == known[nearest]:
            most = belief.item()
            found = outer(label.x, group, config) if p is None else surely(p, config)
            said = (
                f"label {label.number} has {size} samples that lie together and look like class"
                f" {int(source)} ({most:.2f}) more than like the rest"
            )
    if found is not None:
        run.note(f"{said}: they are taken for poison from that class")
    return found


def outer(x: Tensor, group: Tensor, config: SearchConfig) -> Tensor:
    """bool (n,): a group without the share `trim` of it that is nearest to the others along x."""
    apart = (x - x[~group].mean()).abs()
    return group & (apart >= apart[group].quantile(config.trim))


def surely(p: Tensor, config: SearchConfig) -> Tensor:
    """bool (n,): samples whose probability p (n,) of being in a group exceeds `sure`; at least the
    surer half of the group."""
    return p >= p[p > 0.5].median().clamp_max(config.sure)


# --- where a label's samples lie


def whiten(x: Tensor, labels: Tensor, num_classes: int) -> list[tuple[Tensor, Tensor]]:
    """Express each label's features in units of how the *other* labels' samples vary.

    After the statistic of SCAn (Demon in the Variant, Tang et al., USENIX Security 2021): what
    people, poses and light do to an image is alike in all classes; what a trigger does is not.

    Args:
        x: (N, D) features.
        labels: int64 (N,).
        num_classes: K.

    Returns:
        for each label, from its own mean and float64: its samples (D, n_k), and the other labels'
        means (D, at most K - 1).
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

        # The within-class covariance of the other labels, with a tenth of its mean variance added
        # so that it has an inverse.
        others = (total - part.T @ part) / (len(x) - len(part))
        ridge = 0.1 * others.diagonal().mean().clamp_min(1e-12)
        others += ridge * torch.eye(len(others), dtype=x.dtype, device=x.device)
        root = torch.linalg.cholesky(others)

        present = [k for k in range(num_classes) if k != label and len(centred[k])]
        elsewhere = torch.stack([means[k] - means[label] for k in present], 1)
        found.append(
            (
                torch.linalg.solve_triangular(root, part.T, upper=False),
                torch.linalg.solve_triangular(root, elsewhere, upper=False),
            )
        )
    return found


def strangest_direction(samples: Tensor) -> Tensor:
    """(D,): the direction of length 1 in which whitened samples (D, n) vary most."""
    return torch.linalg.eigh(samples @ samples.T).eigenvectors[:, -1]


def mixture_groups(samples: Tensor, x: Tensor, separation: float) -> list[Tensor]:
    """Fit a mixture of two normal distributions of one spread, from both ends of x.

    2-means cuts a label with a tenth of poison in the middle of its clean part; a mixture finds
    groups of any size. The line on which it lies is the one between its two means, which turns as
    they move.

    Args:
        samples: float64 (D, n), whitened.
        x: float64 (n,), the samples along one direction; a fit starts from the outermost twentieth.
        separation: distance of the means, in standard deviations, below which they are one group.

    Returns:
        for each group that was found, the probability (n,) that a sample belongs to it.
    """
    found = []
    for end in (x, -x):
        p = (end >= end.quantile(0.95)).to(x.dtype) if len(x) else x
        for _ in range(100):
            # M step: the share, the means along the line between them, and the common variance.
            p = p.clamp(1e-9, 1 - 1e-9)
            share, weights = p.mean(), torch.stack([p / p.sum(), (1 - p) / (1 - p).sum()])
            towards = samples @ (weights[0] - weights[1])
            along = towards @ samples / towards.norm()
            means = weights @ along
            square = (along - means[:, None]).square()
            variance = (p * square[0] + (1 - p) * square[1]).mean()

            # E step: the posterior probability of the first group.
            p = (share.logit() + (square[1] - square[0]) / (2 * variance)).sigmoid()

        group = p > 0.5
        if group.any() and not group.all() and means[0] - means[1] > separation * variance.sqrt():
            found.append(p)
    return found


def stray(x: Tensor, others: Tensor, least: int) -> float:
    """Distance of a group's mean from the other labels' means, in standard deviations of these.

    Args:
        x: (n,), the group along one direction.
        others: (L,), the other labels' means along it.
        least: with fewer other labels the distance is 0.
    """
    if len(others) < least:
        return 0.0
    return ((x.mean() - others.mean()).abs() / others.std().clamp_min(1e-12)).item()


def sarle(x: Tensor) -> float:
    """Sarle's bimodality coefficient (skewness^2 + 1) / kurtosis of x (n,): 1 for two points, 5/9
    uniform, 1/3 normal."""
    if len(x) < 4:
        return 0.0
    x = x - x.mean()
    variance = x.square().mean()
    if variance <= 0:
        return 0.0
    skewness, kurtosis = (x**3).mean() / variance**1.5, (x**4).mean() / variance**2
    return ((skewness.square() + 1) / kurtosis).item()


def two_means(x: Tensor) -> Tensor:
    """bool (n,): the upper of the two groups of x (n,) with the least squared distance to their
    means. In one dimension the best cut is found exactly."""
    # The cut with the most variance between the groups, by sums over the ordered values.
    ordered = x.sort().values
    n = len(x)
    below = torch.arange(1, n, device=x.device)
    sums = ordered.cumsum(0)
    between = sums[:-1].square() / below + (sums[-1] - sums[:-1]).square() / (n - below)
    return x > ordered[between.argmax()]


# --- how many classes a group shows


def variety(
    x: Tensor,
    groups: list[Tensor],
    labels: Tensor,
    label: int,
    generator: torch.Generator,
    limit: int,
) -> list[float]:
    """Measure how many classes each group of one label shows.

    A linear probe learns to tell the *other* labels apart. A group's variety is the mutual
    information of image and answer in it (answers that are sure, and differ), divided by that among
    the other labels.

    Args:
        x: (N, D) features from which the content of an image can be told.
        groups: int64 indices of samples of `label`.
        labels: int64 (N,).
        limit: largest number of samples that the probe is trained on.

    Returns:
        for each group 0 for one class, 1 for as many as the other labels have.
    """
    ask = probe(x, labels, label, generator, limit)
    if ask is None:
        return [0.0] * len(groups)

    # The probe's answers on the other labels are the measure.
    most = information(ask(ask.known))
    found = []
    for group in groups:
        # Moved to the others' mean: a trigger that shifts all of its images is no content.
        part = x[group].float()
        answer = ask((part - part.mean(0)) / ask.std)
        found.append(information(answer) / most if len(answer) > 1 and most > 0 else 0.0)
    return found


class Probe(NamedTuple):
    """A linear classifier of all labels but one: float (n, D) in its own units -> probabilities (n,
    K)."""

    known: Tensor
    """float (n, D): what it was trained on, in these units: less `mean`, over `std`."""
    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return (x @ self.weight.T + self.bias).softmax(1)


def probe(
    x: Tensor, labels: Tensor, label: int, generator: torch.Generator, limit: int
) -> Probe | None:
    """Train a probe on features x (N, D) of the other labels, at most `limit` samples; None where
    fewer than two other labels have samples."""
    others = (labels != label).nonzero().squeeze(1)
    if len(labels[others].unique()) < 2:
        return None
    others = others[torch.randperm(len(others), generator=generator)[:limit].to(others.device)]
    known = x[others].float()
    mean, std = known.mean(0), known.std(0).clamp_min(1e-6)
    known = (known - mean) / std

    # Multinomial logistic regression with an L2 penalty.
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
