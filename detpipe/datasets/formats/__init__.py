"""Formats of data sets: how each is recognized, read and written."""
