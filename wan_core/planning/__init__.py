"""What a run will need and take, told before a weight is read."""
