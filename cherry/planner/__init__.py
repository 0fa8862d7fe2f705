"""The planner: memory, step time, checkpoints, failures and cost of a run before a GPU is taken.

It needs no torch and measures nothing: it computes from the model's shapes, data sheets and measured efficiencies.
"""
