"""What a finished run shows: the pipeline of several stages, its plots and its HTML report."""
