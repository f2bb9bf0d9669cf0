"""Read by Python at its start, where this folder is on PYTHONPATH: then torch is not to be had.

So it is wherever only `requirements.txt` is installed; what finds torch imports it, for a third of the time to start.
"""

import sys
import warnings
from importlib.machinery import PathFinder


class _WithoutTorch(PathFinder):
    """Finds all but torch. None in its place in `sys.modules` would do, but for SciPy, which looks for arrays of it."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == "torch" else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = _WithoutTorch
# As pyproject.toml has it for pytest's own process.
for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
    warnings.filterwarnings("error", category=category, module="jax_backtrack|configs|__main__")
