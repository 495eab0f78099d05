"""Small things every layer may use. Standard library only: no torch, no numpy."""
