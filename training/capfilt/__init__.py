"""CapFilt: caption a data set again and keep what matches, on one machine or many."""
