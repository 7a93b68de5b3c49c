"""Weight tables: the names of our parameters and of a checkpoint's tensors."""
