"""elastic_run: fault-tolerant, elastic PyTorch training behind `elastic-run`.

Importing this package imports no torch, starts no thread and reads no environment.
"""

__version__ = "0.1.0"
