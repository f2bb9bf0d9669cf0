"""Runs lm-evaluation-harness with one model more: `python -m jax_backtrack.integrations.lm_eval --model jax_backtrack`.

The harness knows only the models of its own package by name, and looks for no others; so this names one more and then
runs the harness's own command line.
"""

import sys

from jax_backtrack.errors import InputError

try:
    import lm_eval.models  # noqa: F401  its own models stay known beside ours
    from lm_eval.__main__ import cli_evaluate
except ImportError as error:
    sys.exit(f"error: {error}: pip install -r requirements-lm-eval.txt")

from jax_backtrack.integrations.lm_eval import model  # noqa: F401  it registers itself

if __name__ == "__main__":
    try:
        cli_evaluate()
    except InputError as error:
        sys.exit(f"error: {error}")
