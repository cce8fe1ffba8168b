"""Text for the scripts: corpora, tokens, windows, segments, stages and evaluation protocols."""
