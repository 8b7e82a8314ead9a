"""Models of Hugging Face's formats: what of ours they can express, and both ways."""
