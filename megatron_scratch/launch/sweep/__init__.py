"""`megatron-scratch train -m`: one run a point of a sweep, here or as jobs of a cluster."""
