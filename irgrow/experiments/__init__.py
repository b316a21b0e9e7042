"""Experiments: complete runs that write a folder of results."""
