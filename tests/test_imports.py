"""Every module of the package can be imported, in one process and without torch."""

import importlib.util

from tests import processes

# Modules and the package that each extends.
OPTIONAL = {
    "jax_backtrack.integrations.lm_eval.model": "lm_eval",
    "jax_backtrack.integrations.lm_eval.__main__": "lm_eval",
}
OF_TRANSFORMERS = "jax_backtrack.hub.custom_generate.generate"  # goes into exports; transformers runs it, with torch


def test_every_module_can_be_imported():
    files = (processes.ROOT / "jax_backtrack").rglob("*.py")
    modules = {".".join(path.relative_to(processes.ROOT).with_suffix("").parts) for path in files}
    missing = {name for name, extended in OPTIONAL.items() if importlib.util.find_spec(extended) is None}
    imports = [f"import {name.removesuffix('.__init__')}" for name in sorted(modules - {OF_TRANSFORMERS} - missing)]
    process = processes.start("-c", "\n".join(imports))
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
