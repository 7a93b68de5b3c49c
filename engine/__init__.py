"""TensorRT engines: builder, profiles, fingerprint. Nothing is here yet."""
