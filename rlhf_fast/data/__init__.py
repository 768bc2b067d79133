"""Text and rows: reading files, checking rows, turning text into token ids. Nothing here knows a model."""
