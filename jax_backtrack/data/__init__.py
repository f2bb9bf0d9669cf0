"""Preference data in, packed rows of token trees out."""
