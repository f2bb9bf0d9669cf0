"""A judge that reads replies with SmolLM2's first layers; set `judge.data` and run with --mode=fit-judge."""

from configs import base


def get_config():
    """The defaults are for SmolLM2-135M."""
    return base.get_config()
