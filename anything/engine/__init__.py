"""Embedded inference engine: scheduler, model runner, detokenizer."""
