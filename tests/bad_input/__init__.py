"""The cases behind docs/errors.md: each spoils one thing of a small run that works, and gives the command to start.

A case gets its `Bench`, whose files it may change, and returns the words of a command line. What is wrong, in words,
is its key here and the first column of the page's tables. The four groups say when it must be found.
"""

from tests.bad_input import adapter, data, deepspeed_file, model, planner, recipe, run_folder
from tests.bad_input.bench import ROW, Bench, Case, make_bench

__all__ = ["AFTER_A_RUN", "EARLY", "LATE", "ROW", "TOGETHER", "Bench", "Case", "make_bench"]

# Before anything starts.
EARLY = recipe.EARLY | deepspeed_file.EARLY | model.EARLY | data.EARLY | planner.EARLY
# The same, beside a finished run.
AFTER_A_RUN = run_folder.AFTER_A_RUN | adapter.AFTER_A_RUN
# When weights, all rows or a checkpoint are read, by an engine.
LATE = data.LATE | model.LATE | run_folder.LATE
# Between two processes.
TOGETHER = run_folder.TOGETHER
