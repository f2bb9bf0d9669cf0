"""Recipes: `base.py` names every field once, the others say what differs."""
