"""New-LLM itself: the recurrence, the model, its loss, decoding, and the folder of a trained model."""
