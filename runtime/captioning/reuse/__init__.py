"""Captions live sources such as a camera; reuses the results of an earlier frame if a new frame hardly differs."""
