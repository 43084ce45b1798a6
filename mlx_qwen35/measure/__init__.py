"""Log-probabilities of a text by a loaded model, and the difference of two models with one layer in memory at a time.

score.py gives the log-probability of each token. text.py cuts a text in windows of tokens, layerwise.py runs a model
over them, divergence.py compares two models: perplexity, KL divergence, top-1 agreement. predictions.py is what both
make of logits, slice by slice.
"""
