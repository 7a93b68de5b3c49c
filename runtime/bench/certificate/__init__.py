"""The certificate of a bundle: recorded reference outputs, and their comparison on another machine or backend."""
