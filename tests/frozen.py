"""Imported last by the fork server: what it has imported is left alone by the garbage collectors of its forks.

DeepSpeed collects garbage whenever it initialises, which takes a third of a second with torch's objects among those that
are looked at, and copies every page of them.
"""

import gc

gc.collect()
gc.freeze()
