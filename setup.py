"""What pyproject.toml can't say: the packages are `core`, as ditc itself, and the folders of core/folders.py."""

from runpy import run_path

from setuptools import setup

PLACES = {"ditc": "core"} | {f"ditc.{name}": name for name in run_path("core/folders.py")["FOLDERS"]}

setup(packages=list(PLACES), package_dir=PLACES)
