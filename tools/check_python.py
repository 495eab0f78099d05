"""Refuse a Python that the package does not run on, before anything is downloaded."""

import sys

if not (3, 10) <= sys.version_info[:2] <= (3, 12):
    sys.exit(f"error: Python {sys.version.split()[0]}; allowed: 3.10 to 3.12; run `make PYTHON=python3.11 ...`")
