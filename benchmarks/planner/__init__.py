"""The planner beside measurements: memory of a rank, bytes and seconds of a step."""
