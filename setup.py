"""Packaging: the repository's folders become the namespace package ``halny``.

``kernels/`` is imported as ``halny.kernels`` and ``model/`` as ``halny.model``. Neither may be a top-level package of
its own, and neither holds an ``__init__.py``: Hugging Face publishes a package whose import name is ``kernels``, and
transformers imports from it when it is there (tests/test_packaging.py guards this).
"""

from setuptools import setup

CORE = [
    "torch>=2.11,<2.14",
    "triton>=3.6; platform_system == 'Linux'",
    "transformers>=5,<6",
    "safetensors>=0.5",
    "numpy>=1.26",
    "tqdm>=4.66",
    "matplotlib>=3.8",
    # the Mistral-7B-v0.1 tokenizer: mistral-common ships its file, sentencepiece reads it
    "mistral-common>=1.8",
    "sentencepiece>=0.2",
]
DATA = ["pyarrow>=17"]
QUALITY = [
    # The same XGBoost as the package xgboost, under the same import name, without the 0.5 GB of NCCL and GPU code that
    # would stand beside torch's own; it has wheels for x86-64 and for Arm.
    "xgboost-cpu>=3.2,<4",
    # Polish morphology, its dictionary inside the wheel. There is none for Linux on Arm (GH200).
    "morfeusz2>=1.99.10; platform_machine != 'aarch64'",
    *DATA,
]
EXTRAS = {
    # kernels: Hugging Face's, whose import name ours must leave alone
    "test": [
        "pytest>=8",
        "pytest-benchmark>=5",
        "hypothesis>=6.100",
        "ruff>=0.8",
        "kernels>=0.10",
        "ctranslate2>=4.6",
        *QUALITY,
    ],
    "data": DATA,  # for prepare_data's .parquet and .jsonl.zst
    "quality": QUALITY,  # for python -m halny.model.quality and prepare_data --quality
    # FlashAttention for Hopper and Blackwell: pure Python, so the same wheel on x86-64 and on GH200's Arm cores. Its
    # beta number in the range is what lets pip take betas at all; kernels/attention.py calls one private name of it.
    "flash": ["flash-attn-4>=4.0.0b36,<5; platform_system == 'Linux'"],
    "log": ["tensorboard>=2.16", "wandb>=0.17"],
}

ROOMS = ("data", "estimate", "record", "run")  # folders of model/

setup(
    name="halny",
    version="0.1.0",
    description="Mistral-class training at the speed of a Hopper GPU: Triton kernels, a lean model, one FSDP trainer",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["halny.kernels", "halny.model", *(f"halny.model.{room}" for room in ROOMS)],
    package_dir={"halny.kernels": "kernels", "halny.model": "model"},
    install_requires=CORE,
    extras_require=EXTRAS,
)
