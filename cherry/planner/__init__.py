"""Owns the plan of a run: what fits, how fast it is and what it costs, before a GPU is taken.

It needs no torch and measures nothing: it reckons from the model's shapes, data sheets and a few measured rates.
"""
