"""Report formats. Each module of this folder is one format, and ends in `RENDER`."""
