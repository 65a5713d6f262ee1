"""The command line, a module for each command; `cli` puts them together."""
