"""Sources of training samples: generated scenes, COCO files, folders and shards. Needs no torch."""
