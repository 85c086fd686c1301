"""From text to integer arrays: `corpus` (where it comes from), `tokenizer`, `sequences`, `prepare` for all."""
