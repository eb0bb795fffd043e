"""Package metadata and dependencies of dsmoelora."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """`__version__` out of the package's source, because importing the package would import torch."""
    source = (ROOT / "dsmoelora" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', source, flags=re.MULTILINE)
    if found is None:
        raise RuntimeError('dsmoelora/__init__.py has no line like: __version__ = "0.1.0"')
    return found[1]


# A lower bound is the oldest version we have run; an upper bound is where the next incompatible release may be.
# `make test-versions` runs the lower bounds of torch, deepspeed and transformers (tests/versions/, docs/versions.md).
# constraints.txt holds the exact versions of the ones whose behaviour our numbers depend on.
REQUIRES = [
    "torch>=2.9.1,<2.14",  # tensors and autograd
    "deepspeed>=0.19.4,<0.20",  # ZeRO-3; parallel/zero.py reads its internals, and says what each version lacks
    "transformers>=5.17,<6",  # models, tokenizers, chat templates, learning-rate schedules
    "accelerate>=1.13,<2",  # transformers loads weights into ZeRO-3 partitions with its help
    "datasets>=5.1,<6",  # hub names, folders, tokenising, samples on disk; before 5.1 resumed streams lose rows
    "pyarrow>=21",  # reads Parquet
    "filelock>=3.20",  # one process of a machine tokenises, the others wait
    "safetensors>=0.8,<1",  # adapters and checkpoints: no pickle
    "sentencepiece>=0.2.1",  # tokenizers that come as a bare `.model` file
    "protobuf>=6.31",  # transformers reads sentencepiece models through it
    "jsonargparse[signatures]>=4.53,<5",  # typed YAML recipes with command-line overrides, out of our dataclasses
    "numpy>=2",  # per-sample token counts; the order of samples
    "packaging>=24",  # doctor.py compares versions
    "psutil>=6",  # whether the process that uses a run's folder lives; deepspeed needs it too
    "pyyaml>=6",  # recipes as text: `--print_config`, messages with line numbers
    "rich>=14",  # progress bar and tables
    "tensorboard>=2.20",  # curves in a browser
]

MPI = ["mpi4py>=4"]  # `mpirun` and `deepspeed --launcher openmpi`

# Where metrics may go (`train.report_to`), and figures of finished runs (launch/plot.py).
WANDB = ["wandb>=0.31"]
TRACKIO = ["trackio>=0.43"]
PLOT = ["matplotlib>=3.10"]

# Bases in 4 bits (`model.quantize`): its operators for CPU, CUDA, ROCm and XPU.
QUANT = ["bitsandbytes>=0.50"]

# Tasks of lm-evaluation-harness (`launch/evaluate.py --tasks`).
EVAL = ["lm-eval>=0.4.13"]

# What launch/serve.py puts an adapter into: fastapi, uvicorn, openai's types.
SERVE = ["transformers[serving]"]

DEMO = [
    "gguf>=0.19",  # reads the demo model's file
    "reasoning-gym>=0.1.25",  # writes the demo's instruction set, offline
]

DEV = [
    *DEMO,  # the tests prepare and run the demo
    *PLOT,  # the tests draw figures
    *QUANT,  # the tests train on a base in 4 bits
    *EVAL,  # the tests run a task
    *SERVE,  # the tests talk to a server
    *MPI,  # the tests start ranks on several nodes with mpirun
    "pytest>=9",  # the tests
    "pytest-xdist>=3.8",  # the tests, two files at a time
    "hypothesis>=6",  # tests of properties, on random conversations
    "peft>=0.20,<0.22",  # the yardstick of the benchmarks, and an independent LoRA for tests
    "ruff>=0.17,<0.18",  # formatting and lint; formatting changes between minor versions
    "mypy>=2.4,<3",  # types
    "import-linter>=2.16",  # keeps the floors apart
    "codespell>=2.4",  # spelling
]

setup(
    name="dsmoelora",
    version=read_version(),
    description="Instruction tuning with mixtures of low-rank experts under DeepSpeed ZeRO-3",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["dsmoelora", "dsmoelora.*"]),
    package_data={"dsmoelora": ["py.typed", "planner/devices.yaml"]},
    install_requires=REQUIRES,
    extras_require={
        "mpi": MPI,
        "wandb": WANDB,
        "trackio": TRACKIO,
        "plot": PLOT,
        "quant": QUANT,
        "eval": EVAL,
        "serve": SERVE,
        "demo": DEMO,
        "dev": DEV,
    },
)
