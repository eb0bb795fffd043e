"""Imported last by the fork server: what it has imported is left alone by the garbage collectors of its forks.

DeepSpeed collects garbage whenever it initialises: a third of a second, with all objects of torch among those that are
looked at, and a copy of every page of them.
"""

import gc

gc.collect()
gc.freeze()
