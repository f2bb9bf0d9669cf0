"""Conversations in, token ids out: chat templates, [RESET], and text that stays text."""
