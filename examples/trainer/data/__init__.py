"""From files and tables of images to batches."""
