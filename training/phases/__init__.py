"""Training phases: losses, trained parts and data of each phase."""
