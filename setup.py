"""Packaging that needs a line of code: the folder configs/ is installed as the package megatron_scratch.configs."""

from setuptools import find_packages, setup

CONFIGS = "megatron_scratch.configs"

setup(
    packages=[*find_packages(include=["megatron_scratch", "megatron_scratch.*"]), CONFIGS],
    package_dir={CONFIGS: "configs"},
    package_data={CONFIGS: ["**/*.yaml"]},
)
