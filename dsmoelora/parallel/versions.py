"""Which versions of DeepSpeed `parallel.zero` was read against, and which it refuses."""

from __future__ import annotations

import deepspeed
from packaging.version import Version

from dsmoelora.errors import bad_value

KNOWN_VERSIONS = ("0.19.4", "0.19.5", "0.19.6", "0.19.7", "0.19.8")
# Before it stages 1 and 2 drop gradients on a CPU (`split_half_float_double`), and before 0.19.7 they do not say where
# parameters begin in their flat partitions (`round_robin_bit16_offsets`).
_FIRST_OF_STAGES_1_AND_2 = "0.19.8"


def is_known_version() -> bool:
    """Whether `parallel.zero` was checked against the DeepSpeed at hand; another one has its partitions checked."""
    return deepspeed.__version__.partition("+")[0] in KNOWN_VERSIONS


def check_version(stage: int = 3) -> None:
    """Refuse a DeepSpeed that is older than what `parallel.zero`, or a stage of ZeRO, needs.

    Raises:
        ConfigError: it is
    """
    first = _FIRST_OF_STAGES_1_AND_2 if stage in (1, 2) else KNOWN_VERSIONS[0]
    if Version(deepspeed.__version__) < Version(first):
        of_stage = f" for zero_optimization.stage {stage}" if stage in (1, 2) else ""
        other = "Use stage 3 (ds_configs/zero3.json), or: " if of_stage else ""
        raise bad_value(
            "deepspeed.__version__",
            deepspeed.__version__,
            f"{first} or newer{of_stage}",
            f"{other}pip install deepspeed=={KNOWN_VERSIONS[-1]}",
        )
