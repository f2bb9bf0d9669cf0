"""Trains and evaluates several models, one after another, and compares them."""
