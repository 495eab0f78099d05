"""A run and its traces as pages, pictures and tables. No torch."""
