"""Hugging Face in and out: weights, gguf, the tokenizer with [RESET], export."""
