"""reid-dist: person re-identification methods as cluster jobs, with the same numbers whatever the number of workers."""

__version__ = "0.1.0"
