"""Conversations as people see them: in the terminal, in a browser, in a notebook."""
