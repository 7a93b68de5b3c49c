"""Where samples come from: one source a kind, all with the interface of `sources`. Needs no torch."""
