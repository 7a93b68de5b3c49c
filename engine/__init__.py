"""TensorRT engines of a bundle's graphs: profiles, the builder, fingerprints. Imports no torch."""
