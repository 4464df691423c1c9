"""The files that stages exchange: what each holds, who writes it, how it is read. Imports no torch."""
