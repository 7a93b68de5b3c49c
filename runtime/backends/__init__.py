"""The backends, which load and run graphs; and code that detects this machine's processor, GPUs and providers."""
