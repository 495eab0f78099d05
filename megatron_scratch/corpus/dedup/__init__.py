"""What repeats: exact copies, near copies by MinHash-LSH, lines and paragraphs; datatrove's signature files."""
