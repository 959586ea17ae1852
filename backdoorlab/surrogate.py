"""An ordinary model trained on the clean training images, for attacks whose trigger is made with one."""

from dataclasses import replace

from . import data, engine
from .config import TrainingConfig
from .data import Dataset
from .models import Classifier
from .run import Run
from .runner import new_model


def train_surrogate(dataset: Dataset, config: TrainingConfig, run: Run, epochs: int | None) -> Classifier:
    """The attacked architecture, trained by the attacked model's recipe in `epochs` (None: as many). In evaluation mode."""
    model = new_model(dataset, config).to(run.device)
    recipe = config.recipe() if epochs is None else replace(config.recipe(), epochs=epochs)
    engine.train(model, data.place(dataset.train, run.device), recipe, run, stage="surrogate")
    return model.eval()
