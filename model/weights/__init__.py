"""Weight tables: they map the names of our parameters to the names of a checkpoint's tensors."""
