"""The trust campaign, `python -m bench trust`: runs are killed, damaged and crossed, and must lose nothing."""
