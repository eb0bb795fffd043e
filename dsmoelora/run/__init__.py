"""The folder of a run: what lies in it, whether it may be used, and whether it goes on as what it was."""
