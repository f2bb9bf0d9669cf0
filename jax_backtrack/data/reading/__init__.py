"""Finds files of data and reads the rows in them."""
