"""Training phases: what each trains, on what, with which loss."""
