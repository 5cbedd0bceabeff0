"""The command line: one module per command, with its options and what it calls. Nothing heavy is imported before a
command runs, so that --help and mistakes are answered at once.
"""
