"""The embedded inference engine: scheduler, model runner, detokenizer."""
