"""What hangs on the training loop: progress, metrics, curves, canary, health, samples, summary."""

from dsmoelora.callbacks.base import Callback, TrainingRun
from dsmoelora.callbacks.canary import Canary
from dsmoelora.callbacks.health import RouterHealth
from dsmoelora.callbacks.memory import PeakMemory
from dsmoelora.callbacks.metrics import MetricsFile
from dsmoelora.callbacks.progress import ProgressBar
from dsmoelora.callbacks.samples import Samples, check_samples
from dsmoelora.callbacks.scores import HeldOutScore
from dsmoelora.callbacks.summary import Summary
from dsmoelora.callbacks.trackers import open_trackers
from dsmoelora.callbacks.utilisation import Utilisation

__all__ = [
    "Callback",
    "Canary",
    "HeldOutScore",
    "MetricsFile",
    "PeakMemory",
    "ProgressBar",
    "RouterHealth",
    "Samples",
    "Summary",
    "TrainingRun",
    "Utilisation",
    "check_samples",
    "open_trackers",
]
