"""What pyproject.toml cannot say: where the packages are. The file also marks a checkout for the
library."""

import sys

from setuptools import find_packages, setup

packages = find_packages(include=["backdoorlab", "backdoorlab.*"])
places = {"": "."}

# The folders attack/, defense/ and resource/ travel inside the package when it is built as a wheel.
# An editable install puts the checkout onto Python's path instead, and nothing else: beside a
# checkout named backdoorlab, that is all that keeps Python from taking its folder for the package.
if "editable_wheel" not in sys.argv:
    inside = ("attack", "defense", "resource")
    packages += [f"backdoorlab.{name}" for name in inside]
    places |= {f"backdoorlab.{name}": name for name in inside}

setup(packages=packages, package_dir=places)
