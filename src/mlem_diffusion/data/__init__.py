"""Images: from an archive, a folder or a program to one packed array."""
