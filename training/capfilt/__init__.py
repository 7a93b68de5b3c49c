"""CapFilt: generates captions for a data set and keeps those that match, on one machine or many."""
