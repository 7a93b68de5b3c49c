"""The backends, which load and run graphs; and the detection of this machine's processor, GPUs and providers."""
