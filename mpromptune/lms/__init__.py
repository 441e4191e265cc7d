"""Language models under DSPy: their errors, requests, adapters and prices."""
