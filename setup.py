"""Packaging that needs lines of code: configs/ is installed as megatron_scratch.configs, launch/ as megatron_scratch.templates."""

from setuptools import find_packages, setup

CONFIGS, TEMPLATES = "megatron_scratch.configs", "megatron_scratch.templates"

setup(
    packages=[*find_packages(include=["megatron_scratch", "megatron_scratch.*"]), CONFIGS, TEMPLATES],
    package_dir={CONFIGS: "configs", TEMPLATES: "launch"},
    package_data={
        CONFIGS: ["**/*.yaml"],
        TEMPLATES: ["*.sbatch", "*.sh", "*.yaml"],
        "megatron_scratch.report": ["*.js", "*.css", "vendor/*"],
    },
)
