"""Training phases: the losses of each, what it trains and on which data."""
