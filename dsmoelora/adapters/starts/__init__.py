"""What factors start from."""
