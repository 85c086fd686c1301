"""The machine: hardware, memory, files, the console; nothing here knows what a model is."""
