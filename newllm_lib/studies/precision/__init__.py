"""The same run in several number formats, step by step."""
