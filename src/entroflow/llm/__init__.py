"""Entropy control for language models (Entropy dynamics, 2602.03392)."""
