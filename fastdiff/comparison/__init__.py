"""Which categories were gained and lost, with the statistics that show whether it is real."""
