"""Stands in for an engine on PYTHONPATH: it has a version and the tool that times batches."""
