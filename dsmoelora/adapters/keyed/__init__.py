"""Random numbers that are functions of where a token stands."""
