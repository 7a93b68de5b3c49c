"""Where ``blip2edge watch`` reads frames from, and where it sends captions to."""
