"""One HTML file that shows what a run found. Imports no torch."""
