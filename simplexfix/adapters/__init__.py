"""Map one encoder's features into the space of another, whose index stays as it is."""

from .query_drift import QueryDrift

__all__ = ["QueryDrift"]
