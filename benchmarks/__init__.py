"""Measurements on real devices; each module prints what repeats it."""
