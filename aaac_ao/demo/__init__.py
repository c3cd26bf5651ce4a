"""The demo: a small Llama trained on Python's standard library, quantised in every way and compared."""
