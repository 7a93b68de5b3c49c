"""Captioning: the pipeline from pictures to captions, the scheduler, and matching of pictures with texts."""
