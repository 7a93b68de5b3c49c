"""Where ``blip2edge watch`` gets its frames (sources), and where it sends its captions (sinks)."""
