"""Packages of the wheel: those of dist_vpt/, and configs/ and launch/, which it carries as folders of dist_vpt."""

from setuptools import find_packages, setup

FOLDERS = {"dist_vpt.configs": "configs", "dist_vpt.launch": "launch"}

setup(packages=[*find_packages(include=["dist_vpt*"]), *FOLDERS], package_dir=FOLDERS)
