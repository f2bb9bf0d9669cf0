"""Releases of other packages: a private name that has gone is missed in words, and only where it is needed."""

import subprocess
import sys

import pytest

from tests.processes import ROOT


@pytest.mark.parametrize(
    ("gone", "tried", "message"),
    [
        (
            "jax._src.clusters.GceTpuCluster",
            "from jax_backtrack.distributed import hosts; print(hosts.several()); hosts.start('localhost:1234', 2, 0)",
            "several hosts meet by jax._src.distributed.global_state, which jax",
        ),
        (
            "transformers.utils.chat_template_utils._compile_jinja_template",
            "from jax_backtrack.tokenizer import chat_template; print(False); chat_template.ChatTemplate(None)",
            "which transformers",
        ),
    ],
)
def test_a_private_name_that_is_gone_is_missed_where_it_is_needed(gone, tried, message):
    """The package is imported in a process of its own, after the name was taken from its module."""
    module, _, name = gone.rpartition(".")
    program = f"import {module} as module; del module.{name}; {tried}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n", done.stderr
    assert "InputError" in done.stderr and message in done.stderr and "install an older release" in done.stderr
