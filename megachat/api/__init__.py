"""The Python API, of which megachat/__init__.py exports the public names."""
