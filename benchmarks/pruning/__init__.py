"""Pruning: the papers' tables."""
