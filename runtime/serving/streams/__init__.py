"""The sources of frames of ``blip2edge watch``, and the receivers of its captions."""
