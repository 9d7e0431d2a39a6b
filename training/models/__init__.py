"""Segmentation networks: one file each."""
