"""Self-distilled registers: what runs of signals/distill.py are made of."""
