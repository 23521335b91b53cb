"""Benchmarks, run as scripts: ``python bench/kernels.py``. A package so that pytest imports it by its full name."""
