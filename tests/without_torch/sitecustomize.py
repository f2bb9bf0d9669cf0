"""Read by Python at its start, where this folder is on PYTHONPATH: then torch is not to be had.

So it is wherever only `requirements.txt` is installed; what finds torch imports it, for a third of the time to start.
"""

import sys

sys.modules["torch"] = None
