"""Perplexity, KL divergence and top-1 agreement of text models on a text, with one layer in memory at a time.

text.py cuts a text in windows of tokens, layerwise.py runs a model over them, divergence.py compares two models.
"""
