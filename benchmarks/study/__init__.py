"""Which of several ways to train learns best, told apart from chance: `python -m benchmarks.study --help`."""
