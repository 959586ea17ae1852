"""backdoorlab: a benchmark of backdoor attacks and defenses for image classifiers."""

__version__ = "0.1.0"
