"""Raw files to groups, images to tiles, groups to batches."""
