"""The programs that are run by hand."""
