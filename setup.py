"""Metadata and packaging. The folders attack/, defense/ and resource/ travel inside the package
when it is built as a wheel."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
REQUIRED = [
    "torch>=2.10",
    "torchvision",
    "timm>=1.0,<2",
    "numpy",
    "pandas",
    "pyyaml",
    "safetensors",
    "tyro",
    "tqdm",
    "scikit-learn",
    "pyarrow",
    "matplotlib",
]
match = re.search(r'__version__ = "(.+)"', (HERE / "backdoorlab" / "__init__.py").read_text())
assert match

setup(
    name="backdoorlab",
    version=match.group(1),
    description="A reproducible benchmark of backdoor attacks and defenses for image classifiers",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    install_requires=REQUIRED,
    extras_require={
        "dev": [
            *(
                "ruff",
                "mypy",
                "pytest",
                "pytest-xdist",
                "pytest-timeout",
                "hypothesis",
                "types-PyYAML",
                "build",
                "setuptools",
                "wheel",
            ),
            *("plotly", "selenium"),
        ],
        "hub": ["huggingface_hub>=1.0"],
        "report": ["plotly"],
        "ray": ["ray"],
        "slurm": ["submitit"],
        "track": ["tensorboard", "wandb", "mlflow-skinny"],
    },
    packages=[
        "backdoorlab",
        *(
            f"backdoorlab.{folder}"
            for folder in (
                "models",
                "datasets",
                "storage",
                "settings",
                "execution",
                "tables",
                "report",
                "bench",
                "exchange",
            )
        ),
        *("backdoorlab.attack", "backdoorlab.defense", "backdoorlab.resource"),
    ],
    package_dir={
        "backdoorlab": "backdoorlab",
        "backdoorlab.attack": "attack",
        "backdoorlab.defense": "defense",
        "backdoorlab.resource": "resource",
    },
    package_data={
        "backdoorlab.resource": ["*.yaml", "config/*.yaml", "page/*"],
        "backdoorlab": ["py.typed"],
    },
    entry_points={"console_scripts": ["backdoorlab = backdoorlab.__main__:main"]},
)
