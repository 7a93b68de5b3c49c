"""Weight tables: which tensor of a checkpoint goes where."""
