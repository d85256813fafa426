"""Evaluation: exact ranking, protocols, re-ranking. Arrays in, records out.

The modules of this folder import NumPy, SciPy, torch and each other only, so that the folder can be copied into another
project; extraction and Ray live in `distributed/`.
"""
