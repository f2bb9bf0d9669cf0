"""Text in, replies out: one jitted loop over a cache whose slices can be taken back."""
