"""What pyproject.toml has no words for: modules to compile. All else is there."""

from core_build import extensions  # of deploy/wheel, the build backend
from setuptools import setup

setup(ext_modules=extensions())
