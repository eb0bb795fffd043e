"""What hangs on the training loop: progress, metrics, curves, canary, samples, summary."""

from dsmoelora.callbacks.base import Callback, TrainingRun
from dsmoelora.callbacks.canary import Canary
from dsmoelora.callbacks.memory import PeakMemory
from dsmoelora.callbacks.metrics import METRICS_FILE, MetricsFile, read_metrics
from dsmoelora.callbacks.progress import ProgressBar
from dsmoelora.callbacks.samples import Samples
from dsmoelora.callbacks.summary import ADAPTER_FOLDER, Summary
from dsmoelora.callbacks.tensorboard import TensorBoard

__all__ = [
    "ADAPTER_FOLDER",
    "METRICS_FILE",
    "Callback",
    "Canary",
    "MetricsFile",
    "PeakMemory",
    "ProgressBar",
    "Samples",
    "Summary",
    "TensorBoard",
    "TrainingRun",
    "read_metrics",
]
