"""What machine this is."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path


@cache
def cpu_vendor() -> str:
    """`AuthenticAMD`, `GenuineIntel`, ... as Linux tells it; elsewhere what Python knows, maybe nothing."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("vendor_id"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
