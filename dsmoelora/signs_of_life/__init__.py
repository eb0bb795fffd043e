"""Signs of life: what a rank last did, and a word about waits that take longer than a moment."""
