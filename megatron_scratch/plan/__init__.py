"""What a layout costs, known before it is submitted."""
