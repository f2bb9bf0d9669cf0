"""Trains, samples and evaluates models that backtrack: `python main.py --config=sft_smollm.py --workdir=DIR`.

The same as the command `jax-backtrack` of the installed package.
"""

from jax_backtrack.main import run

if __name__ == "__main__":
    run()
