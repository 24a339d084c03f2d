"""Files become models: which files, what is in them, and how their tensors get into modules without a second copy."""
