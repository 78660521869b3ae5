"""Where documents and conversations come from: files, datasets, the Python installation."""
