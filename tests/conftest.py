"""Shared set-up. The folder itself is on the path, so that tests can import the independent loop and the samples."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "parity")]
