from setuptools import setup

setup()  # all is in pyproject.toml
