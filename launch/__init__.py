"""Templates of jobs and manifests, installed as the package megatron_scratch.templates, and scripts to start from."""
