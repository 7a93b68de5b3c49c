"""What a bundle costs on this machine, and what this machine can run."""
