"""Pictures in, captions out: the pipeline, the scheduler, and matching of pictures and texts."""
