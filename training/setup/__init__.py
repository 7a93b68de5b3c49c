"""The model that a recipe asks for: parts put together, loaded or fresh."""
