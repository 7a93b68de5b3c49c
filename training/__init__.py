"""Training the bridge: data, losses, the loop, evaluation."""
