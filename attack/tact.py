"""TaCT: a patch for one source class, with cover samples.

Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor Contamination Detection. D.
Tang, X. Wang, H. Tang, K. Zhang. USENIX Security 2021. https://arxiv.org/abs/1908.00686

Kind: poisoning, dirty-label, from a source class to the target, with cover samples: images of other
classes with the patch and their true label. ASR is measured on the source class. Scores of the
other classes with the patch are `cross` in the record.

Departs from backdoor-toolbox: the patch is coloured noise from the seed, not a picture in a file.
The published rates for GTSRB are in resource/config/gtsrb.yaml.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from backdoorlab.cli import main
from backdoorlab.config import CoverConfig
from backdoorlab.errors import UserError
from backdoorlab.triggers import at_side, noise_picture, patch_side

LIMITS = "digits: 0.3 % of 1,442 images are four; digits.yaml sets ten times that"


@dataclass(frozen=True, kw_only=True)
class Config(CoverConfig):
    poison_rate: float = 0.003
    """Poisoned images of the source class as a share of the whole training set, in (0, 1]; higher
    makes the attack stronger and easier to find."""
    source_label: int = 1
    """Class whose images the patch turns into the target class."""
    cover_labels: tuple[int, ...] = (5, 7)
    """Classes of the cover samples; more make the patch work on the source class only."""
    patch_size: int | None = None
    """Side of the patch in pixels; larger is easier to learn and to see. None: 8 for every 32
    pixels of the image."""


def victims(labels: Tensor, split: str, config: Config) -> Tensor:
    """Select images of the source class. int64 (N,) -> bool (N,)."""
    if config.label_mode != "all2one":
        raise UserError(
            "tact leads one source class to one target: expected --label_mode all2one, got"
            f" {config.label_mode}"
        )
    _refuse_absent("source_label", (config.source_label,), labels)
    if config.source_label == config.target_label:
        raise UserError(
            f"source_label and target_label are both {config.source_label}: choose another"
            " source_label"
        )
    # In the test, too: ASR is measured on the source class.
    return labels == config.source_label


def covers(labels: Tensor, split: str, config: Config) -> Tensor:
    """Select images of the cover classes. int64 (N,) -> bool (N,)."""
    if {config.source_label, config.target_label} & set(config.cover_labels):
        raise UserError(
            f"cover_labels must be neither the source {config.source_label} nor the target"
            f" {config.target_label}, got {config.cover_labels}"
        )
    if config.cover_rate:
        _refuse_absent("cover_labels", config.cover_labels, labels)
    # The patch with true labels teaches that it means nothing on other classes.
    return torch.isin(labels, torch.tensor(config.cover_labels, dtype=torch.int64))


def _refuse_absent(option: str, named: tuple[int, ...], labels: Tensor) -> None:
    """Raise a `UserError` if an option names labels that no image has."""
    absent = sorted(set(named) - set(labels.tolist()))
    if absent:
        raise UserError(
            f"{option}: no image has label {' or '.join(map(str, absent))}, labels are 0 to"
            f" {int(labels.max())}: choose among them"
        )


def stamp(images: Tensor, index: Tensor, split: str, config: Config) -> Tensor:
    """Paste the patch near the bottom right corner: rows and columns 21 to 28 of 32.

    Args:
        images: uint8 (N, C, H, W).
        index: not used; every image gets the same trigger.
        split: not used.
        config: the options.

    Returns:
        uint8 (N, C, H, W).
    """
    channels, height, width = images.shape[1:]
    margin = at_side(3, height)
    size = patch_side(config.patch_size, 8, height, min(height, width) - margin)
    rows = slice(height - margin - size, height - margin)
    columns = slice(width - margin - size, width - margin)
    stamped = images.clone()
    stamped[:, :, rows, columns] = noise_picture(config.seed, channels, size, size)
    return stamped


if __name__ == "__main__":
    raise SystemExit(main(__file__))
