"""The benchmarks: one suite, run from a checkout. See suite.py; `make bench`, `irgrow bench --help`."""
