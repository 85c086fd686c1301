"""From text to integer arrays: `corpus` (where it comes from), `tokenizer`, `sequences`, and `prepare` for all three."""
