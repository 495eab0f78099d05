"""Run the commands of Markdown pages, in order, in this folder: documentation that is executed stays true.

A fenced block marked `sh` is run with `bash -euo pipefail`; one marked `console` or `sh skip` (clusters, GPUs) is only shown.
`make test` is left out: CI has just run it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


def main(pages: list[str]) -> int:
    """Run every page; returns 1 at the first block that fails, and names it."""
    env = {**os.environ, "PATH": f"{Path('.venv/bin').resolve()}:{os.environ['PATH']}"}
    for page in pages:
        for block in BLOCK.findall(Path(page).read_text("utf-8")):
            commands = "\n".join(line for line in block.splitlines() if line.strip() != "make test")
            print(f"--- {page}\n{commands}", flush=True)
            began = time.monotonic()
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", commands], env=env, check=False)
            print(f"--- {page}: exit {done.returncode} after {time.monotonic() - began:.0f} s", flush=True)
            if done.returncode:
                return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
