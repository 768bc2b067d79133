"""Text and rows: reading files, checking rows, turning text into token ids. Never a model."""
