"""Studies: what the published claims come to where they can be checked, with seeds and error bars."""
