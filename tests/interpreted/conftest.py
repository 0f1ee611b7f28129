"""These tests run the Triton kernels on the CPU, interpreted:

TRITON_INTERPRET=1 pytest tests/interpreted

Triton reads the variable when it is imported, and whatever else a pytest process tests may have imported it already.
So they have a process of their own, which tests/unit/ops/test_interpreted.py starts; elsewhere they are not collected.
"""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
