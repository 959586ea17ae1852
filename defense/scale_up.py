"""SCALE-UP: multiply the pixels of each training image, and flag those whose class stays.

SCALE-UP: An Efficient Black-box Input-level Backdoor Detection via Analyzing Scaled Prediction
Consistency, J. Guo et al., ICLR 2023, https://arxiv.org/abs/2302.03251. Scaled prediction
consistency (SPC) is the share of the factors 3, 5, 7, 9 and 11 with which an image keeps the class
that the model gives it. More than half of them is suspicious.

Assumes: the poisoned training set and the model trained on it. Only the model's answers are used.

Departs: all images count. The published evaluation keeps those that the attack wins and clean ones
that are classified correctly. Images of few grey levels, such as digits, hardly change by scaling.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import Split, in_order, to_device
from backdoorlab.detection import Detection
from backdoorlab.record import DefenderView
from backdoorlab.run import Run

ASSUMES = ("model", "train")


@dataclass(frozen=True, kw_only=True)
class Config(DefenseConfig):
    factors: tuple[float, ...] = (3.0, 5.0, 7.0, 9.0, 11.0)
    """What pixels are multiplied by, before they are clipped to [0, 1]; more tell images apart more
    finely."""
    threshold: float = 0.5
    """Share of the factors above which an image is flagged; higher flags fewer."""

    RANGES: ClassVar[dict[str, str]] = {"factors": "> 0", "threshold": "[0, 1)"}


def detect(view: DefenderView, config: Config, run: Run) -> Detection:
    train = to_device(view.train, run.device)
    suspicion = consistency(view.load_model(), train, config.factors, run)
    return Detection(suspicion, suspicion > config.threshold)


@torch.no_grad()
def consistency(model: nn.Module, split: Split, factors: tuple[float, ...], run: Run) -> Tensor:
    """SPC, float (N,) in [0, 1]: the share of factors with which an image keeps its class."""
    model.eval()
    found = []
    for batch in in_order(split, run.device):
        with run.autocast():
            plain = model(batch.images).argmax(1)
            # Clipped at white: pixels of a trigger that are black or white stay as they are.
            scaled = [model((n * batch.images).clamp_max(1)).argmax(1) for n in factors]
        found.append(torch.stack([answer == plain for answer in scaled]).float().mean(0))
    return torch.cat(found)


if __name__ == "__main__":
    raise SystemExit(main(__file__))
