"""Who runs the tasks of a stage: processes here, a Slurm job array, a Ray cluster. All call `stages.run_task`."""
