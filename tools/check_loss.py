"""Exit with 1 unless the last validation loss of a run is at most a limit: `check_loss.py RUN LIMIT`."""

import sys

from megatron_scratch.train.rundir import RunDir

run, limit = sys.argv[1], float(sys.argv[2])
loss = RunDir(run).last("val_loss")
print(f"{run}: validation loss {loss}, limit {limit}")
sys.exit(loss is None or loss > limit)
