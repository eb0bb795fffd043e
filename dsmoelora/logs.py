"""Log messages: one handler for all libraries, quiet unless asked, warnings always through."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from dsmoelora.errors import bad_value

LEVEL_VARIABLE = "DSMOELORA_LOG_LEVEL"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
# Harmless, and said by every process of every run: they would teach users to skip warnings.
_NOISE = (
    "Setting accelerator to CPU",
    "ZeRO with an untested optimizer",  # ours, and tested here
    "OVERFLOW! Skipping step",  # the trainer says it with the step, the loss and the norm
)


class _StderrHandler(logging.StreamHandler):
    """Writes to what sys.stderr is at that moment: a progress bar puts itself in between while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def setup_logging(rank: int, verbose: bool = False) -> None:
    """Send the messages of all libraries to stderr, in one form.

    Warnings and errors are shown; `verbose` shows everything from INFO up, `DSMOELORA_LOG_LEVEL` any level. Ranks
    other than 0 show errors alone, for they would repeat the rest, and sign them with their number.

    Raises:
        ConfigError: `DSMOELORA_LOG_LEVEL` is no level
    """
    level = os.environ.get(LEVEL_VARIABLE, "INFO" if verbose else "WARNING").upper()
    if level not in _LEVELS:
        raise bad_value(LEVEL_VARIABLE, level, f"one of {', '.join(_LEVELS)}", "Unset it for WARNING.")
    if rank > 0 and level in ("INFO", "WARNING"):
        level = "ERROR"
    handler = _StderrHandler()
    where = f" (rank {rank})" if rank else ""
    handler.setFormatter(logging.Formatter(f"%(levelname)s{where} %(name)s: %(message)s"))
    handler.addFilter(_is_no_noise)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    if level != "DEBUG":
        # Advice to developers of the libraries below us, nothing that a user could act on.
        for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
    _adopt_libraries(level, rank)


def _adopt_libraries(level: str, rank: int) -> None:
    """DeepSpeed, transformers and datasets bring handlers and levels of their own: replace them by ours."""
    # DeepSpeed's logger gets a handler on stdout, where it would mix with what we print, and is used in the import.
    deepspeed_logger = logging.getLogger("DeepSpeed")
    deepspeed_logger.addFilter(_is_no_noise)
    import datasets
    import deepspeed  # noqa: F401
    import transformers

    deepspeed_logger.handlers.clear()
    deepspeed_logger.propagate = True
    deepspeed_logger.setLevel(level)
    logging.getLogger("huggingface_hub").handlers.clear()  # it propagates as well and would say everything twice
    transformers.logging.set_verbosity(getattr(logging, level))
    transformers.logging.disable_default_handler()
    transformers.logging.enable_propagation()
    datasets.logging.set_verbosity(getattr(logging, level))
    if level in ("WARNING", "ERROR"):
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()


def _is_no_noise(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(text in message for text in _NOISE)
