"""Read by Python at its start, where this folder is on PYTHONPATH: then torch is not to be had.

So it is wherever only `requirements.txt` is installed; what finds torch imports it, for a third of the time to start.
"""

import sys
import warnings

sys.modules["torch"] = None
# As pyproject.toml has it for pytest's own process.
for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
    warnings.filterwarnings("error", category=category, module="jax_backtrack|configs|__main__")
