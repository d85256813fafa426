"""Sweeps: a file names recipes, axes and splits; every trial is a normal run (design section 7)."""
