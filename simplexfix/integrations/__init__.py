"""Losses, indexes and encoders in the form that other libraries expect; each module imports its library."""

__all__: list[str] = []
