"""Exit with 1 unless the last validation losses of two runs differ by at most a part: `compare_loss.py RUN_A RUN_B 0.01`."""

import sys

from megatron_scratch.train.rundir import RunDir

a, b = (RunDir(run).last("val_loss") for run in sys.argv[1:3])
apart = float("inf") if a is None or b is None else abs(a - b) / min(a, b)
print(f"{sys.argv[1]}: validation loss {a}, {sys.argv[2]}: {b}, apart {apart:.2%}, limit {float(sys.argv[3]):.2%}")
sys.exit(not apart <= float(sys.argv[3]))
