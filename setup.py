"""Puts what stands at the checkout's top level into the wheel, inside the package.

A wheel installs no top-level name but microdit_jax (microdit_jax.files.shipped finds these again).
All else about the package stands in pyproject.toml.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("configs", "train_main.py", "sample_main.py")


class BuildPy(build_py):
    def run(self):
        super().run()
        if self.editable_mode:  # the checkout itself is used
            return
        for name in SHIPPED:
            target = Path(self.build_lib, "microdit_jax", name)
            if Path(name).is_dir():
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(name, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(name, target)


setup(cmdclass={"build_py": BuildPy})
