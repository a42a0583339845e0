"""Image data: read an archive or a folder, or draw portraits, and pack the images into one array."""
