"""To and from Hugging Face folders: each direction proves its result before anybody can see it."""
