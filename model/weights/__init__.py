"""Weight tables: they map parameter names of this project's models to the names of a checkpoint's tensors."""
