"""Attacks that look for a prompt which makes a reply unsafe."""
