"""What brings a run's files to trackers, in processes of their own. Training only appends to files. No torch."""
