from setuptools import setup

setup()  # pyproject.toml says everything; the file also marks a checkout for the library
