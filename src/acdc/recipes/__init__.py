"""Recipes: functions that return everything about a run."""
