"""A model class for lm-evaluation-harness."""
