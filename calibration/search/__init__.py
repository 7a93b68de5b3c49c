"""Which precision each part gets: sensitivity, agreement of captions, the choice."""
