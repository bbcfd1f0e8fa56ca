"""jrnn beside other libraries, on the same work: see README.md; run with ``python benchmarks/run.py``."""
