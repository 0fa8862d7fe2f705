"""Calibrated quantization of a weights folder: the tokens that it is calibrated with, and the program."""
