"""CapFilt: generates captions for a data set and keeps the captions that match, on one machine or many."""
