"""From a resolved config to processes: on this machine, and later on clusters."""
