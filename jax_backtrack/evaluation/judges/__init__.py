"""Judges say whether a reply is safe, or better: a matcher, a probe, language models."""
