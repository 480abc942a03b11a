"""Ratios against peers that are measured in the same run; see ``claims.py`` for what must hold."""
