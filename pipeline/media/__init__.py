"""Media: from a reference to the pixels of images and videos."""
