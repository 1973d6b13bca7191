"""Starting a run on hosts: one file of settings, and scripts for bare hosts, Slurm and Kubernetes rendered from it.

Imports no torch, so that ``scale-digrap launch --help`` and ``--dry-run`` answer at once.
"""
