"""Benchmarks that need a GPU, with a dry path for any machine."""
