"""Checkpoints: any layout to any layout, committed atomically, hashed, without executable content.

Nothing is imported here: `manifest` and `inspect` serve commands on login nodes, which do without torch.
"""
