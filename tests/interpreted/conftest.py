"""Tests of the Triton kernels on the CPU, interpreted:

TRITON_INTERPRET=1 pytest tests/interpreted tests/distributed/test_kernels.py

Triton reads the variable when it is imported, which other tests in the same pytest process may have done already. So
tests/unit/ops/test_interpreted.py runs them in separate processes; without the variable they are not collected.
"""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
