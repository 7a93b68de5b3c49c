"""Builds TensorRT engines of a bundle's graphs: profiles, the builder, fingerprints; imports no torch."""
