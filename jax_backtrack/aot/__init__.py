"""Compiles for devices that are not here, and reads what a program costs."""
