"""Evaluations as tables, pages, plots and transcripts."""
